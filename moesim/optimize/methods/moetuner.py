"""MoETuner's two integer programmes: even clusters of experts in each layer, then which GPU has which cluster.

Source: MoETuner (arXiv 2502.06643). The paper lets clusters of one layer have unlike numbers of experts, with equal
totals over the layers; a method here must put as many experts of each layer on every rank (`clusters` does without
that)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model
from scipy.optimize import linear_sum_assignment

from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.problem import Floats, Ints, Problem

SCALE = 100_000
"""Loads become whole numbers that sum to this."""


@dataclass(frozen=True)
class MoeTuner:
    """limit_s: seconds for the clusters of one layer; gap: at which a programme is good enough, the paper's."""

    limit_s: float = 5.0
    gap: float = 0.025
    takes_uneven: ClassVar[bool] = False
    takes_copies: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = True

    def place(self, problem: Problem, demand: Demand, clock: Clock) -> Ints:
        """Clusters layer by layer, then ranks for clusters."""
        size = problem.num_experts // problem.num_ranks
        cluster_LE = np.array(
            [self.clusters(load_E, problem.num_ranks, size, clock) for load_E in demand.load_LE], np.int64
        )
        rank_LC = self.ranks(cluster_LE, demand, problem)
        rank_LE = np.take_along_axis(rank_LC, cluster_LE, axis=1)
        return np.argsort(rank_LE, axis=1, kind="stable").astype(np.int32)

    def clusters(self, load_E: Floats, num_clusters: int, size: int | None, clock: Clock) -> NDArray[np.int64]:
        """First programme: the least sum of distances of clusters' loads to their mean; cluster of each expert, [E].

        size: experts in each cluster; any number above 0 if None.
        """
        whole_E = np.round(np.asarray(load_E) * SCALE / max(float(np.sum(load_E)), 1e-300)).astype(int)
        mean, model, experts = round(int(whole_E.sum()) / num_clusters), cp_model.CpModel(), range(len(whole_E))
        greedy_E, full = np.zeros(len(whole_E), np.int64), np.zeros(num_clusters)
        filled = np.zeros(num_clusters, np.int64)
        for e in np.argsort(-whole_E, kind="stable"):
            c = int(np.argmin(np.where(filled < (size or len(whole_E)), full, np.inf)))
            greedy_E[e] = c
            full[c] += whole_E[e]
            filled[c] += 1
        if clock.is_over:
            return greedy_E
        y = [[model.new_bool_var("") for _ in range(num_clusters)] for _ in experts]
        far = [model.new_int_var(0, SCALE, "") for _ in range(num_clusters)]
        for e in experts:
            model.add_exactly_one(y[e])
            for c in range(num_clusters):
                model.add_hint(y[e][c], bool(greedy_E[e] == c))
        for c in range(num_clusters):
            load = cp_model.LinearExpr.weighted_sum([y[e][c] for e in experts], whole_E.tolist())
            model.add(far[c] >= load - mean)
            model.add(far[c] >= mean - load)
            count = sum(y[e][c] for e in experts)
            model.add(count == size if size else count >= 1)
        model.minimize(sum(far))
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds = min(self.limit_s, clock.left_s)
        solver.parameters.relative_gap_limit, solver.parameters.num_workers = self.gap, 2
        if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return greedy_E
        return np.asarray(np.array([[solver.value(v) for v in row] for row in y]).argmax(axis=1))

    @staticmethod
    def ranks(cluster_LE: NDArray[np.int64], demand: Demand, problem: Problem) -> NDArray[np.int64]:
        """Second programme: rank of each cluster, [L, C], for little traffic over slow links, layer after layer.

        A layer's clusters are assigned exactly, given the layer before; the paper's programme takes all layers at once
        and the fullest pair of ranks.
        """
        num_ranks = problem.num_ranks
        far_RR = 1.0 + (problem.node_R[:, None] != problem.node_R) * 8.0  # links in a node are some 9 times as fast
        np.fill_diagonal(far_RR, 0.0)
        one_of = np.eye(num_ranks, dtype=np.float32)
        rank_LC = np.tile(np.arange(num_ranks), (len(cluster_LE), 1))
        for layer in range(1, len(cluster_LE)):
            before_ER = one_of[rank_LC[layer - 1][cluster_LE[layer - 1]]]
            from_RC = before_ER.T @ demand.next_LEE[layer - 1] @ one_of[cluster_LE[layer]]
            rows, columns = linear_sum_assignment(from_RC.T @ far_RR)
            rank_LC[layer, rows] = columns
        return rank_LC
