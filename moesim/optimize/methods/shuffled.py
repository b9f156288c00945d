"""Experts in random order, further copies of random ones: what a method must at least beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.problem import Ints, Problem


@dataclass(frozen=True)
class Shuffled:
    """Another order in each layer, by a seed."""

    seed: int = 0
    takes_uneven: ClassVar[bool] = True
    takes_copies: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False

    def place(self, problem: Problem, demand: Demand, clock: Clock) -> Ints:
        """Every expert once, then any of them again."""
        rng, num_experts = np.random.default_rng(self.seed), problem.num_experts
        layers = []
        for _ in range(demand.num_layers):
            further = np.concatenate(
                [rng.permutation(num_experts) for _ in range(-(-(problem.num_slots - num_experts) // num_experts))]
                or [np.zeros(0, np.int64)]
            )
            layers.append(rng.permutation(np.append(np.arange(num_experts), further)[: problem.num_slots]))
        return np.array(layers, np.int32)
