"""Speculative MoE: experts and requests clustered together, so that requests start where their experts are.

Source: Speculative MoE (arXiv 2503.04398): alternating greedy clusters of experts and of requests, then swaps of pairs
while they gain; `num_rounds` times, the best kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moesim.optimize.balance import copies_of
from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.problem import Floats, Ints, Problem
from moesim.optimize.score import in_groups_LEG


@dataclass(frozen=True)
class CoClustering:
    """One clustering of requests for all layers, one of experts for each; clusters are ranks.

    together, request, load: weights of what an expert has to do with the experts and with the requests of a cluster,
        and of the cluster's load, each as a share.
    swaps: tries of a pair, for each expert.
    """

    together: float = 1.0
    request: float = 1.0
    load: float = 1.0
    swaps: int = 16
    num_rounds: int = 3
    seed: int = 0
    takes_uneven: ClassVar[bool] = True
    takes_copies: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = True

    def place(self, problem: Problem, demand: Demand, clock: Clock) -> Ints:
        """The experts' part of `cluster`."""
        return self.cluster(problem, demand, clock)[0]

    def cluster(self, problem: Problem, demand: Demand, clock: Clock) -> tuple[Ints, Ints]:
        """Slots [L, P], and the rank of each request, [Q], in order of their numbers; ranks have as many requests."""
        requests, number_T = np.unique(demand.request_T, return_inverse=True)
        num_layers, num_experts = demand.num_layers, demand.num_experts
        uses_LQE = np.zeros((num_layers, len(requests), num_experts), np.float32)
        for layer in range(num_layers):
            np.add.at(uses_LQE[layer], (number_T[:, None], demand.ids_TLK[:, layer].astype(np.int64)), 1.0)
        rng = np.random.default_rng(self.seed)
        rank_Q = rng.permutation(np.arange(len(requests)) % problem.num_ranks).astype(np.int32)
        best: tuple[float, Ints, Ints] | None = None
        for _ in range(self.num_rounds):
            found = [self._experts(problem, demand, layer, uses_LQE[layer], rank_Q, rng) for layer in range(num_layers)]
            slot_LP = np.array([slot_P for slot_P, _ in found], np.int32)
            at_LER = in_groups_LEG(problem, slot_LP, "rank").astype(np.float32)
            local_QR = np.einsum("lqe,ler->qr", uses_LQE, at_LER, optimize=True)
            rank_Q = self.homes(local_QR, problem.num_ranks)
            local = float(local_QR[np.arange(len(requests)), rank_Q].sum() / uses_LQE.sum())
            fullest = float(np.mean([full for _, full in found]))
            worth = local - fullest / problem.num_ranks
            if best is None or worth > best[0]:
                best = worth, slot_LP, rank_Q
            if clock.is_over:
                break
        assert best is not None
        return best[1], best[2]

    def _experts(
        self, problem: Problem, demand: Demand, layer: int, uses_QE: Floats, rank_Q: Ints, rng: np.random.Generator
    ) -> tuple[Ints, float]:
        """Expert in each slot, and the fullest rank over the mean."""
        load_E, num_ranks = demand.load_LE[layer], problem.num_ranks
        count_E = copies_of(load_E, problem.num_slots)
        pairs_EE = demand.together_LEE[layer] / max(float(demand.together_LEE[layer].sum()), 1.0)
        near_ER = np.zeros((len(load_E), num_ranks), np.float32)
        for rank in range(num_ranks):
            near_ER[:, rank] = uses_QE[rank_Q == rank].sum(axis=0)
        near_ER *= self.request / max(float(uses_QE.sum()), 1.0)
        drawn_ER = np.zeros_like(near_ER)  # to the experts of each rank
        full_R, room_R = np.zeros(num_ranks), problem.slots_R.copy()
        item_P, rank_P = [], []
        for e in np.argsort(-load_E, kind="stable").tolist():
            for _ in range(count_E[e]):
                worth_R = self.together * drawn_ER[e] + near_ER[e] / count_E[e]
                worth_R = worth_R - self.load * full_R / max(load_E.sum(), 1.0) * load_E[e] / max(load_E.mean(), 1e-300)
                rank = int(np.argmax(np.where(room_R > 0, worth_R, -np.inf)))
                drawn_ER[:, rank] += pairs_EE[e] / count_E[e]
                full_R[rank] += load_E[e] / count_E[e]
                room_R[rank] -= 1
                item_P.append(e)
                rank_P.append(rank)
        items, ranks = np.array(item_P), np.array(rank_P)
        for i, j in rng.integers(0, len(items), (self.swaps * len(items), 2)):
            e, f, a, b = items[i], items[j], ranks[i], ranks[j]
            if a == b or e == f:
                continue
            gain = (near_ER[e, b] - near_ER[e, a]) / count_E[e] + (near_ER[f, a] - near_ER[f, b]) / count_E[f]
            gain += self.together * (drawn_ER[e, b] - drawn_ER[e, a]) / count_E[e]
            gain += self.together * (drawn_ER[f, a] - drawn_ER[f, b]) / count_E[f]
            gain -= 2 * self.together * pairs_EE[e, f] / (count_E[e] * count_E[f])
            shift = load_E[e] / count_E[e] - load_E[f] / count_E[f]
            before, after = max(full_R[a], full_R[b]), max(full_R[a] - shift, full_R[b] + shift)
            if gain + self.load * (before - after) / max(load_E.sum(), 1.0) > 0:
                drawn_ER[:, a] += pairs_EE[f] / count_E[f] - pairs_EE[e] / count_E[e]
                drawn_ER[:, b] += pairs_EE[e] / count_E[e] - pairs_EE[f] / count_E[f]
                full_R[a] -= shift
                full_R[b] += shift
                ranks[i], ranks[j] = b, a
        order = np.argsort(ranks, kind="stable")
        return items[order].astype(np.int32), float(full_R.max() * num_ranks / max(load_E.sum(), 1e-300))

    @staticmethod
    def homes(local_QR: Floats, num_ranks: int) -> Ints:
        """Each request where most of its choices are, as long as a rank has room; the most one-sided ones first."""
        rank_Q = np.zeros(len(local_QR), np.int32)
        room_R = np.full(num_ranks, -(-len(local_QR) // num_ranks))
        for q in np.argsort(-(local_QR.max(axis=1) - local_QR.mean(axis=1)), kind="stable"):
            rank = int(np.argmax(np.where(room_R > 0, local_QR[q], -np.inf)))
            rank_Q[q] = rank
            room_R[rank] -= 1
        return rank_Q
