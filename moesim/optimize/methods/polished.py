"""Annealed, then large neighbourhoods: a few ranks of one layer emptied and filled anew, each time by a CP-SAT model.

With the layers beside it fixed, what a layer keeps is a sum over experts and groups, so that such a model is linear,
and exact; the placement so far is its hint. It proves of each neighbourhood that nothing better is in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from ortools.sat.python import cp_model

from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.methods.annealed import Annealed
from moesim.optimize.problem import Ints, Problem
from moesim.optimize.score import in_groups_LEG, scored
from moesim.optimize.search import Caps

SCALE = 1_000_000


@dataclass(frozen=True)
class Polished:
    """num_ranks: emptied at a time, of different nodes where there are as many; rounds: neighbourhoods; limit_s: of
    each.

    Only the transitions' terms of the objective are polished (rank, node, rack), within the same caps of load.
    """

    num_ranks: int = 4
    rounds: int = 60
    limit_s: float = 2.0
    seed: int = 0
    takes_uneven: ClassVar[bool] = True
    takes_copies: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = True

    def place(self, problem: Problem, demand: Demand, clock: Clock) -> Ints:
        """Layers and ranks in random order."""
        start_LP, rng = Annealed(seed=self.seed).place(problem, demand, clock), np.random.default_rng(self.seed)
        slot_LP = start_LP.copy()
        caps = Caps.of(problem, demand.load_LE)
        for _ in range(self.rounds):
            if clock.is_over:
                break
            layer = int(rng.integers(demand.num_layers))
            order = rng.permutation(problem.num_ranks)
            node_R = problem.node_R[order]
            apart = sorted(range(problem.num_ranks), key=lambda i: int((node_R[:i] == node_R[i]).sum()))
            chosen = order[apart[: self.num_ranks]].astype(np.int32)
            slot_LP[layer] = self._refilled(problem, demand, clock, caps, slot_LP, layer, chosen)
        both = (start_LP, slot_LP)  # what load costs is not polished, and may have grown
        return min(both, key=lambda one: scored(problem, one, demand).objective(problem.weights))

    def _refilled(
        self, problem: Problem, demand: Demand, clock: Clock, caps: Caps, slot_LP: Ints, layer: int, chosen: Ints
    ) -> Ints:
        """One layer's slots with those of the chosen ranks filled as well as can be."""
        worth_ER = np.zeros((problem.num_experts, problem.num_ranks))
        for level in ("rank", "node", "rack"):
            if weight := getattr(problem.weights, level):
                near = slot_LP[max(0, layer - 1) : layer + 2]
                groups, group_R = in_groups_LEG(problem, near, level), problem.group_R(level)
                if layer > 0:
                    worth_ER += weight * (demand.next_LEE[layer - 1].T @ groups[0])[:, group_R]
                if layer + 1 < demand.num_layers:
                    worth_ER += weight * (demand.next_LEE[layer] @ groups[-1])[:, group_R]
        count_E = problem.counts(slot_LP[layer : layer + 1])[0]
        slots = [p for r in chosen for p in range(problem.first_R[r], problem.first_R[r + 1])]
        items = slot_LP[layer][slots]
        load_I = demand.load_LE[layer][items] / count_E[items]
        worth_IC = worth_ER[items][:, chosen] / count_E[items][:, None]
        step = SCALE / max(float(np.abs(worth_IC).max()), 1e-300)
        unit = SCALE / max(float(load_I.sum()), 1e-300)
        model, size_C = cp_model.CpModel(), problem.slots_R[chosen]
        x = [[model.new_bool_var("") for _ in chosen] for _ in items]
        start_I = np.repeat(np.arange(len(chosen)), size_C)
        whole_I = np.round(load_I * unit).astype(int).tolist()
        rank_full_R = np.bincount(problem.rank_P, demand.load_LE[layer][slot_LP[layer]] / count_E[slot_LP[layer]])
        node_full_N = np.bincount(problem.node_R, rank_full_R)
        for i in range(len(items)):
            model.add_exactly_one(x[i])
            for c in range(len(chosen)):
                model.add_hint(x[i][c], bool(start_I[i] == c))
        for c, rank in enumerate(chosen):
            column = [x[i][c] for i in range(len(items))]
            model.add(sum(column) == int(size_C[c]))
            cap = max(float(caps.rank_L[layer] * problem.speed_R[rank]), float(rank_full_R[rank]))
            model.add(cp_model.LinearExpr.weighted_sum(column, whole_I) <= int(cap * unit) + len(items))
            for e in np.unique(items):
                if (items == e).sum() > 1:
                    model.add_at_most_one(x[i][c] for i in np.flatnonzero(items == e))
        for node in np.unique(problem.node_R[chosen]):
            inside = [c for c, rank in enumerate(chosen) if problem.node_R[rank] == node]
            others = node_full_N[node] - rank_full_R[chosen[inside]].sum()
            cap = max(float(caps.node_LN[layer, node]), float(node_full_N[node])) - others
            terms = [x[i][c] for c in inside for i in range(len(items))]
            model.add(cp_model.LinearExpr.weighted_sum(terms, whole_I * len(inside)) <= int(cap * unit) + len(items))
        flat = [x[i][c] for i in range(len(items)) for c in range(len(chosen))]
        model.maximize(cp_model.LinearExpr.weighted_sum(flat, np.round(worth_IC * step).astype(int).ravel().tolist()))
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds, solver.parameters.num_workers = min(self.limit_s, clock.left_s), 2
        result = slot_LP[layer].copy()
        if solver.solve(model) in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            place_I = np.array([[solver.value(v) for v in row] for row in x]).argmax(axis=1)
            result[slots] = items[np.argsort(place_I, kind="stable")]
        return np.asarray(result)
