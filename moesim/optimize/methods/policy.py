"""Placement policies of scenarios as methods: contiguous, round robin, EPLB."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.problem import Ints, Problem
from moesim.policies.placement import Contiguous, Eplb, Placer, RoundRobin


@dataclass(frozen=True)
class OfPolicy:
    """What a policy of `moesim.policies.placement` says."""

    policy: Placer
    takes_uneven: ClassVar[bool] = False
    takes_copies: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False

    def place(self, problem: Problem, demand: Demand, clock: Clock) -> Ints:
        """By the load of all tokens together."""
        placed = self.policy.place(problem.num_slots, problem.num_ranks, problem.per_node, demand.load_LE)
        return placed.slot_expert_LP.astype(np.int32)


@dataclass(frozen=True)
class HierarchicalEplb(OfPolicy):
    """EPLB that keeps expert groups, and copies, in their node, where the groups divide evenly among the nodes."""

    policy: Placer = field(default_factory=Eplb)

    def place(self, problem: Problem, demand: Demand, clock: Clock) -> Ints:
        """With the problem's number of groups."""
        return OfPolicy(Eplb(problem.num_groups)).place(problem, demand, clock)


CONTIGUOUS, ROUND_ROBIN, EPLB = OfPolicy(Contiguous()), OfPolicy(RoundRobin()), OfPolicy(Eplb())
