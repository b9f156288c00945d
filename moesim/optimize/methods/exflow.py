"""ExFlow's integer programme: fewest transitions between GPUs with as many experts on each, first nodes, then GPUs.

Source: ExFlow (arXiv 2401.08383). The paper counts tokens one by one; here transitions are counted together, pair by
pair of experts, which is the same sum. Where the programme would be too large (`most_terms`), layers are assigned in
turn with their neighbours fixed, which is exact for one layer (an assignment problem), until nothing gains; else that
is the hint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model
from scipy.optimize import linear_sum_assignment

from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.problem import Ints, Problem

Singles = NDArray[np.float32]


@dataclass(frozen=True)
class ExFlow:
    """Load does not count, only numbers of experts.

    staged: nodes first, then ranks inside each; else ranks at once.
    limit_s: seconds for all programmes of a stage; most_terms: pairs of experts times groups of a programme.
    """

    staged: bool = True
    limit_s: float = 60.0
    most_terms: int = 20_000
    takes_uneven: ClassVar[bool] = False
    takes_copies: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = True

    def place(self, problem: Problem, demand: Demand, clock: Clock) -> Ints:
        """All layers together."""
        num_layers, per_node = demand.num_layers, problem.num_ranks // problem.num_nodes
        whole = np.tile(np.arange(demand.num_experts), (num_layers, 1))
        if not self.staged or problem.num_nodes == 1:
            rank_LE = self._assigned([demand.next_LEE], problem.num_ranks, clock)[0]
            return np.argsort(rank_LE, axis=1, kind="stable").astype(np.int32)
        node_LE = self._assigned([demand.next_LEE], problem.num_nodes, clock)[0]
        mine_NLE = [whole[node_LE == node].reshape(num_layers, -1) for node in range(problem.num_nodes)]
        inner = [
            np.array([w[np.ix_(a, b)] for w, a, b in zip(demand.next_LEE, mine_LE[:-1], mine_LE[1:], strict=True)])
            for mine_LE in mine_NLE
        ]
        slots = [
            np.take_along_axis(mine_LE, np.argsort(rank_LE, axis=1, kind="stable"), axis=1)
            for mine_LE, rank_LE in zip(mine_NLE, self._assigned(inner, per_node, clock), strict=True)
        ]
        return np.concatenate(slots, axis=1).astype(np.int32)

    def _assigned(self, parts: list[Singles], num_groups: int, clock: Clock) -> list[NDArray[np.int64]]:
        """Group of each expert, [L, E], of parts that have nothing to do with each other; they share the time."""
        found = [in_turn(next_LEE, num_groups, clock) for next_LEE in parts]
        small = [
            i for i, next_LEE in enumerate(parts)
            if num_groups > 1 and np.count_nonzero(next_LEE) * num_groups <= self.most_terms
        ]  # fmt: skip
        for i in small:
            if not clock.is_over:
                limit_s = min(self.limit_s / len(small), clock.left_s)
                found[i] = self._programme(parts[i], num_groups, found[i], limit_s)
        return found

    @staticmethod
    def _programme(next_LEE: Singles, num_groups: int, hint_LE: NDArray[np.int64], limit_s: float) -> NDArray[np.int64]:
        """The integer programme: a pair of experts costs its transitions unless both are in one group."""
        (num_layers, num_experts), model = hint_LE.shape, cp_model.CpModel()
        x = [
            [[model.new_bool_var("") for _ in range(num_groups)] for _ in range(num_experts)] for _ in range(num_layers)
        ]
        for layer in range(num_layers):
            for e in range(num_experts):
                model.add_exactly_one(x[layer][e])
                for g in range(num_groups):
                    model.add_hint(x[layer][e][g], bool(hint_LE[layer, e] == g))
            for g in range(num_groups):
                model.add(sum(x[layer][e][g] for e in range(num_experts)) == num_experts // num_groups)
        kept, worth = [], []
        for layer, e, f in np.argwhere(next_LEE > 0).tolist():
            for g in range(num_groups):
                both = model.new_bool_var("")
                model.add_implication(both, x[layer][e][g])
                model.add_implication(both, x[layer + 1][f][g])
                kept.append(both)
                worth.append(round(float(next_LEE[layer, e, f])))
        model.maximize(cp_model.LinearExpr.weighted_sum(kept, worth))
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds, solver.parameters.num_workers = limit_s, 2
        if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return hint_LE
        return np.asarray(np.array([[[solver.value(v) for v in row] for row in rows] for rows in x]).argmax(axis=2))


def in_turn(next_LEE: Singles, num_groups: int, clock: Clock, most_sweeps: int = 20) -> NDArray[np.int64]:
    """Layers assigned to groups of equal numbers one by one, forwards and backwards, each the best for its neighbours.

    Returns:
        Group of each expert, [L, E].
    """
    num_layers, num_experts = len(next_LEE) + 1, next_LEE.shape[1]
    group_LE = np.tile(np.arange(num_experts) * num_groups // num_experts, (num_layers, 1))
    one_of = np.eye(num_groups, dtype=np.float32)
    slot_groups, kept = np.sort(group_LE[0]), -1.0
    for sweep in range(most_sweeps):
        order = range(num_layers) if sweep % 2 == 0 else range(num_layers - 1, -1, -1)
        now = 0.0
        for layer in order:
            worth_EG = np.zeros((num_experts, num_groups), np.float32)
            if layer > 0:
                worth_EG += next_LEE[layer - 1].T @ one_of[group_LE[layer - 1]]
            if layer + 1 < num_layers and sweep:
                worth_EG += next_LEE[layer] @ one_of[group_LE[layer + 1]]
            rows, columns = linear_sum_assignment(worth_EG[:, slot_groups], maximize=True)
            group_LE[layer, rows] = slot_groups[columns]
            now += float(worth_EG[rows, slot_groups[columns]].sum())
            if clock.is_over:
                return group_LE
        if now <= kept * (1 + 1e-6):
            break
        kept = now
    return group_LE
