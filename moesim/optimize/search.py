"""Our own search: the most even placement; then, where more counts than the load, annealing that keeps it even."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.optimize.anneal import anneal, attractions
from moesim.optimize.balance import PAIR_DONORS, balanced
from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.pairs import best_pairs, can_try_all
from moesim.optimize.problem import Problem
from moesim.optimize.score import rank_load_SLR

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


def most_even(problem: Problem, load_LE: Floats, pair_donors: int = PAIR_DONORS) -> Ints:
    """The placement with the least fullest rank that compiled swaps find, [L, P]; where all can be tried, the best.

    pair_donors: see `balanced`.
    """
    load_LE = np.ascontiguousarray(load_LE, np.float64)
    if can_try_all(problem):
        return best_pairs(problem, load_LE)[0]
    return balanced(problem, load_LE, pair_donors)


@dataclass(frozen=True, eq=False)
class Caps:
    """How full a placement may make ranks and nodes.

    rank_L: a rank's load over its speed, in each layer; node_LN: a node's load.
    """

    rank_L: Floats
    node_LN: Floats

    @classmethod
    def of(cls, problem: Problem, load_LE: Floats, even_LP: Ints | None = None) -> Caps:
        """By `slack` more than the most even placement has on its fullest rank, and than a node's fair part."""
        even_LP = most_even(problem, load_LE) if even_LP is None else even_LP
        rank_LR = rank_load_SLR(problem, even_LP, load_LE[None])[0]
        node_LN = np.add.reduceat(rank_LR, np.arange(0, problem.num_ranks, problem.per_node), axis=1)
        speed_N = np.add.reduceat(problem.speed_R, np.arange(0, problem.num_ranks, problem.per_node))
        fair_LN = load_LE.sum(axis=1, keepdims=True) * speed_N / speed_N.sum()
        slack = 1 + problem.slack
        return cls(slack * (rank_LR / problem.speed_R).max(axis=1), np.maximum(slack * fair_LN, node_LN))

    def share_L(self, problem: Problem, load_LE: Floats, level: str) -> Floats:
        """The largest share of a layer's load that these let one group of ranks have, [L]."""
        total_L = np.maximum(load_LE.sum(axis=1), 1e-300)
        by_rank_LR = self.rank_L[:, None] * problem.speed_R
        groups = problem.group_R(level)
        by_ranks_L = np.array([np.bincount(groups, weights=row).max() for row in by_rank_LR])
        if level == "rank":
            return np.asarray(np.minimum(1.0, by_ranks_L / total_L))
        node_groups = groups[:: problem.per_node]
        by_nodes_L = np.array([np.bincount(node_groups, weights=row).max() for row in self.node_LN])
        return np.asarray(np.minimum(1.0, np.minimum(by_ranks_L, by_nodes_L) / total_L))

    def exceeded_by(self, problem: Problem, slot_LP: Ints, load_LE: Floats) -> float:
        """By how much, as a share, a placement is above these; 0 where it keeps them."""
        rank_LR = rank_load_SLR(problem, slot_LP, load_LE[None])[0]
        node_LN = np.add.reduceat(rank_LR, np.arange(0, problem.num_ranks, problem.per_node), axis=1)
        over = max(
            float(((rank_LR / problem.speed_R).max(axis=1) / np.maximum(self.rank_L, 1e-300)).max()),
            float((node_LN / np.maximum(self.node_LN, 1e-300)).max()),
        )
        return max(0.0, over - 1) if over > 1 + 1e-9 else 0.0


LEVELS = ("rank", "node", "rack")


def annealed(
    problem: Problem, demand: Demand, clock: Clock, *, start_LP: Ints | None = None, sweeps: int = 120, tries: int = 32,
    hot: float = 2.0, cold: float = 0.05, seed: int = 0,
) -> Ints:  # fmt: skip
    """Swaps from `start_LP` (the most even placement if None), colder with each sweep, within `Caps`.

    Args:
        sweeps, tries: in each sweep a layer tries so many swaps for each of its slots.
        hot, cold: temperature at first and at last, in what a swap changes on the average; the last sweeps take only
            what is better, and so do all where `hot` is 0.
    """
    load_LE = np.ascontiguousarray(demand.load_LE)
    with clock.stopped():  # compiling, the first time, is not searching
        even_LP = most_even(problem, load_LE)
        slot_LP = np.array(even_LP if start_LP is None else start_LP, np.int32)
        state = _State(problem, demand, slot_LP, Caps.of(problem, load_LE, even_LP))
        state.sweep(0.0, 0)
    seed_compiled(seed)
    heat = state.typical_gain()
    for sweep in range(sweeps):
        if clock.is_over:
            break
        is_last = hot == 0 or sweep >= 0.95 * sweeps
        state.sweep(0.0 if is_last else heat * hot * (cold / hot) ** (sweep / sweeps), tries * problem.num_slots)
    return state.slot_LP


class _State:
    """Everything that swaps change, and what they cost."""

    def __init__(self, problem: Problem, demand: Demand, slot_LP: Ints, caps: Caps) -> None:
        weights, self.slot_LP = problem.weights, slot_LP
        load_LE = np.ascontiguousarray(demand.load_LE)
        num_pairs, num_choices = float(demand.next_LEE.sum()), float(demand.together_LEE.sum())
        next_of = {level: getattr(weights, level) / num_pairs if num_pairs else 0.0 for level in LEVELS}
        alike_of = {"node": 2 * weights.spread / num_choices if num_choices else 0.0}
        levels = [level for level in LEVELS if next_of[level] or alike_of.get(level)]
        group_VP = np.array([problem.group_R(level)[problem.rank_P] for level in levels], np.int32)
        group_VP = group_VP.reshape(len(levels), problem.num_slots)
        next_V, alike_V = (np.array([of.get(level, 0.0) for level in levels]) for of in (next_of, alike_of))
        self._count_LE = problem.counts(slot_LP).astype(np.int64)
        self._num_groups = int(group_VP.max(initial=0)) + 1
        self._table_VLEG = attractions(
            slot_LP, group_VP, self._num_groups, self._count_LE, demand.next_LEE, demand.together_LEE, next_V, alike_V
        )
        step_SLE, worth_S = self._steps(problem, demand)
        step_LSR = np.ascontiguousarray(rank_load_SLR(problem, slot_LP, step_SLE).swapaxes(0, 1))
        rank_LR = rank_load_SLR(problem, slot_LP, load_LE[None])[0]
        node_LN = np.add.reduceat(rank_LR, np.arange(0, problem.num_ranks, problem.per_node), axis=1)
        today_LP = slot_LP if problem.today is None else problem.today
        self._rest = (
            problem.first_R, problem.rank_P, problem.node_R, problem.speed_R, group_VP, next_V, alike_V,
            self._table_VLEG, self._count_LE, demand.next_LEE, demand.together_LEE, load_LE, rank_LR, caps.rank_L,
            node_LN, caps.node_LN, step_SLE / self._count_LE, step_LSR, worth_S, today_LP.astype(np.int32),
            weights.moved / slot_LP.size,
        )  # fmt: skip

    @staticmethod
    def _steps(problem: Problem, demand: Demand) -> tuple[Floats, Floats]:
        """Loads whose fullest rank costs something, [S, L, E], and how much a token on it costs, [S]."""
        parts = []
        if problem.weights.steps:
            parts.append((demand.load_SLE, problem.weights.steps))
        if problem.weights.load:
            parts.append((demand.load_SLE.sum(axis=0, keepdims=True), problem.weights.load))
        if not parts:
            return np.zeros((0, demand.num_layers, problem.num_experts)), np.zeros(0)
        worth = []
        for load_SLE, weight in parts:
            mean_S = load_SLE.sum(axis=2).mean(axis=1) / problem.speed_R.sum()
            worth.append(weight / (len(load_SLE) * demand.num_layers * np.maximum(mean_S, 1e-300)))
        return np.concatenate([load_SLE for load_SLE, _ in parts]), np.concatenate(worth)

    def sweep(self, heat: float, num_tries: int) -> float:
        """One temperature; what was gained."""
        return float(anneal(self.slot_LP, *self._rest, heat, num_tries))

    def typical_gain(self) -> float:
        """What a swap changes on the average, roughly."""
        if self._table_VLEG.size and self._num_groups > 1:
            share_LE = 1.0 / self._count_LE
            return float((np.abs(np.diff(self._table_VLEG, axis=3)).mean(axis=(0, 3)) * share_LE).mean())
        worth_S, share_SLE = self._rest[18], self._rest[16]
        return float((worth_S[:, None, None] * share_SLE).std() * 0.1) if worth_S.size else 0.0


@njit(cache=True)
def seed_compiled(seed):  # type: ignore[no-untyped-def]
    """Compiled code has random numbers of its own."""
    np.random.seed(seed)
