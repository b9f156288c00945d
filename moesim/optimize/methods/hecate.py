"""Hecate's placement: experts in evenly busy nodes and devices, and the hottest in all slots that are left.

Source: Hecate (arXiv 2502.02581), Algorithms 1 and 2, as summarised there in words. Two things differ: the paper lets a
device have more slots in one layer than in another, and moves copies anew in every iteration; here every layer has the
same slots, and the copies stay until the next placement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.problem import Floats, Ints, Problem


@dataclass(frozen=True)
class Hecate:
    """hidden_copies: how many experts a device can fetch while it computes what is not MoE; these many of the hottest
    go to every device where it has so many free slots, else free slots are dealt in proportion to load."""

    hidden_copies: int = 2
    takes_uneven: ClassVar[bool] = True
    takes_copies: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False

    def place(self, problem: Problem, demand: Demand, clock: Clock) -> Ints:
        """Layer by layer."""
        return np.array([self._layer(problem, load_E) for load_E in demand.load_LE], np.int32)

    def _layer(self, problem: Problem, load_E: Floats) -> Ints:
        ranks, free = problem.num_ranks, problem.num_slots - problem.num_experts
        order = np.argsort(-load_E, kind="stable").tolist()
        hot = self._copies(load_E, order, free, ranks)
        held: list[list[int]] = [[] for _ in range(ranks)]
        full_R, room_R = np.zeros(ranks), problem.slots_R.copy()

        def put(e: int, load: float, among: Ints) -> None:
            rank = min(among.tolist(), key=lambda r: (full_R[r] / problem.speed_R[r], room_R[r]))
            held[rank].append(e)
            full_R[rank] += load
            room_R[rank] -= 1

        def open_ranks(e: int) -> Ints:
            """Of the least busy node that has room, the ranks with room (for e, if they do not have it already)."""
            can = np.array([r for r in range(ranks) if room_R[r] > 0 and e not in held[r]])
            can = can if len(can) else np.flatnonzero(room_R > 0)
            nodes = np.unique(problem.node_R[can])
            least = min(nodes.tolist(), key=lambda n: full_R[problem.node_R == n].sum() / (problem.node_R == n).sum())
            return np.asarray(can[problem.node_R[can] == least])

        for e in order:
            if e not in hot:
                put(e, float(load_E[e]), open_ranks(e))
        for e, copies in hot.items():
            for _ in range(copies):
                put(e, float(load_E[e]) / copies, open_ranks(e))
        return np.array([e for experts in held for e in experts], np.int32)

    def _copies(self, load_E: Floats, order: list[int], free: int, ranks: int) -> dict[int, int]:
        """Copies of the experts that have several (Algorithm 1)."""
        per_rank = free // ranks
        if 0 < self.hidden_copies <= per_rank:
            hot = dict.fromkeys(order[: self.hidden_copies], ranks)
        else:
            top = order[: max(1, min(self.hidden_copies, len(order)))] if free else []
            share = load_E[top] / max(float(load_E[top].sum()), 1e-300) if top else np.zeros(0)
            dealt = np.floor(share * free).astype(int)
            hot = {e: min(ranks, 1 + int(more)) for e, more in zip(top, dealt, strict=True)}
        left = free - sum(copies - 1 for copies in hot.values())
        for e in order * (left // max(len(order), 1) + 2):  # what the hottest have no use for goes to the next
            if left <= 0:
                break
            if hot.get(e, 1) < ranks:
                hot[e] = hot.get(e, 1) + 1
                left -= 1
        return hot
