"""Greedy placement that keeps experts apart which are busy at the same time.

Source: Towards MoE Deployment (arXiv 2303.06182): experts by falling load, each to the device of least load with room,
to which half the correlation of its load over batches with that of the experts already there is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moesim.optimize.balance import copies_of
from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.problem import Floats, Ints, Problem


@dataclass(frozen=True)
class Anticorrelated:
    """With as many copies as EPLB has, which the paper does without.

    weight: of the mean Pearson correlation, beside a rank's load over the mean rank's.
    """

    weight: float = 0.5
    takes_uneven: ClassVar[bool] = True
    takes_copies: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False

    def place(self, problem: Problem, demand: Demand, clock: Clock) -> Ints:
        """Layer by layer."""
        return np.array([self._layer(problem, demand.load_SLE[:, i]) for i in range(demand.num_layers)], np.int32)

    def _layer(self, problem: Problem, load_SE: Floats) -> Ints:
        load_E = load_SE.sum(axis=0)
        apart_SE = load_SE - load_SE.mean(axis=0)
        norm_E = np.sqrt((apart_SE**2).sum(axis=0))
        related_EE = (apart_SE.T @ apart_SE) / np.maximum(np.outer(norm_E, norm_E), 1e-12)
        count_E = copies_of(load_E, problem.num_slots)
        mean = load_E.sum() / problem.speed_R.sum()
        held: list[list[int]] = [[] for _ in range(problem.num_ranks)]
        full_R = np.zeros(problem.num_ranks)
        for e in np.argsort(-load_E / count_E, kind="stable").tolist():
            for _ in range(count_E[e]):
                cost_R = full_R / problem.speed_R / max(mean, 1e-300)
                for rank, experts in enumerate(held):
                    if len(experts) >= problem.slots_R[rank]:
                        cost_R[rank] = np.inf
                    elif experts:
                        cost_R[rank] += self.weight * related_EE[e, experts].mean()
                rank = int(np.argmin(cost_R))
                held[rank].append(e)
                full_R[rank] += load_E[e] / count_E[e]
        return np.array([e for experts in held for e in experts], np.int32)
