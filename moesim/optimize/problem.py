"""A placement problem: experts of every layer into slots of ranks, what the ranks are, and what is to be small.

Everywhere in `moesim.optimize` a placement is `slot_LP`, int32 [L, P]: the expert in each slot, slots of one rank
side by side, ranks in order; ranks may have unlike numbers of slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesim.layout import Placement

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Weights:
    """How much each term of the objective counts; the objective is their weighted sum.

    load: fullest rank over the mean rank, mean of layers; of all tokens together.
    steps: the same within each step, mean of steps and layers: every step waits for its fullest rank.
    rank, node, rack: share of transitions (choices of one token in layers that follow each other) to another of these.
    spread: share of pairs of one token's choices in one layer that lie in different nodes.
    moved: share of slots whose expert was not on that rank before.
    """

    load: float = 1.0
    steps: float = 0.0
    rank: float = 0.0
    node: float = 0.0
    rack: float = 0.0
    spread: float = 0.0
    moved: float = 0.0

    @property
    def of_traffic(self) -> float:
        """All weights but those of load."""
        return self.rank + self.node + self.rack + self.spread + self.moved


@dataclass(frozen=True, eq=False)
class Problem:
    """What is asked.

    Attributes:
        num_experts: E.
        slots_R: int32 [R], experts that each rank holds in every layer.
        per_node: ranks in a node, which follow each other; per_rack: in a rack, 0 where all are in one.
        speed_R: float64 [R], how fast each rank computes, as a share of the fastest.
        weights: what is to be small.
        slack: where traffic has a weight: by how much, as a share, the fullest rank may exceed the most even placement
            found, and a node its fair part.
        num_groups: of experts, which hierarchical EPLB keeps in one node.
        today: where experts lie before; None if nothing is moved.
    """

    num_experts: int
    slots_R: Ints
    per_node: int
    speed_R: Floats
    per_rack: int = 0
    weights: Weights = field(default_factory=Weights)
    slack: float = 0.05
    num_groups: int = 1
    today: Ints | None = None

    @classmethod
    def even(
        cls, num_experts: int, ep: int, per_node: int, num_redundant: int = 0, *, weights: Weights | None = None,
        slack: float = 0.05, num_groups: int = 1, per_rack: int = 0,
    ) -> Problem:  # fmt: skip
        """On ranks that are alike.

        Raises:
            ValueError: the ranks cannot hold the experts, see `Problem.mistakes`; or the slots do not divide evenly.
        """
        num_slots = num_experts + num_redundant
        if num_slots % ep:
            fit = -num_experts % ep
            raise ValueError(
                f"placement: {num_experts} experts + {num_redundant} redundant = {num_slots} do not divide evenly "
                f"among {ep} ranks; {fit} redundant would do"
            )
        slots_R = np.full(ep, num_slots // ep, np.int32)
        problem = cls(num_experts, slots_R, per_node, np.ones(ep), per_rack, weights or Weights(), slack, num_groups)
        if found := problem.mistakes():
            raise ValueError("\n".join(found))
        return problem

    def mistakes(self) -> list[str]:
        """Every rule that makes this infeasible: which limit, by how much, and what would do."""
        found, slots, ranks = [], int(self.slots_R.sum()), len(self.slots_R)
        short = self.num_experts - slots
        if (self.slots_R < 0).any():
            found.append(f"placement: slots of a rank must be 0 or more, given {int(self.slots_R.min())}")
        elif short > 0:
            found.append(
                f"placement: {self.num_experts} experts need as many slots in each layer, the {ranks} ranks have "
                f"{slots}, {short} too few; {-(-short // ranks)} more on each rank, or "
                f"{-(-short * ranks // max(slots, 1))} more ranks like these, would do"
            )
        if (most := int(self.slots_R.max(initial=0))) > self.num_experts:
            found.append(
                f"placement: a rank has {most} slots for {self.num_experts} experts, {most - self.num_experts} more "
                "than it can use; fewer redundant experts would do"
            )
        if len(self.speed_R) != ranks or not (self.speed_R > 0).all():
            found.append(f"placement: every one of {ranks} ranks needs a speed above 0, given {self.speed_R.tolist()}")
        if self.per_node < 1 or (ranks % self.per_node and ranks > self.per_node):
            found.append(f"placement: {ranks} ranks are not whole nodes of {self.per_node}")
        if self.per_rack and self.per_rack % self.per_node:
            found.append(f"placement: a rack of {self.per_rack} ranks is not whole nodes of {self.per_node}")
        if not self.slack >= 0:
            found.append(f"placement: slack must be 0 or more, given {self.slack}")
        if any(not getattr(self.weights, item.name) >= 0 for item in fields(self.weights)):
            found.append(f"placement: weights must be 0 or more, given {self.weights}")
        if self.weights.moved and self.today is None:
            found.append("placement: a weight of moved experts needs the placement of today; give it as today")
        if self.today is not None and self.today.shape[1] != slots:
            found.append(f"placement: today's has {self.today.shape[1]} slots in each layer, the ranks have {slots}")
        return found

    @property
    def num_ranks(self) -> int:
        """R."""
        return len(self.slots_R)

    @property
    def num_slots(self) -> int:
        """P, of all ranks."""
        return int(self.slots_R.sum())

    @property
    def is_even(self) -> bool:
        """Whether all ranks are alike."""
        return bool((self.slots_R == self.slots_R[0]).all() and (self.speed_R == self.speed_R[0]).all())

    @property
    def has_pairs(self) -> bool:
        """Whether ranks are as fast and have one slot or two, some of them two."""
        return bool(self.slots_R.max() == 2 and self.slots_R.min() >= 1 and np.ptp(self.speed_R) == 0)

    @cached_property
    def first_R(self) -> Ints:
        """First slot of each rank, and the end of the last, [R + 1]."""
        return np.concatenate([[0], np.cumsum(self.slots_R)]).astype(np.int32)

    @cached_property
    def rank_P(self) -> Ints:
        """Rank of each slot."""
        return np.repeat(np.arange(self.num_ranks, dtype=np.int32), self.slots_R)

    @cached_property
    def node_R(self) -> Ints:
        """Node of each rank."""
        return (np.arange(self.num_ranks) // self.per_node).astype(np.int32)

    @cached_property
    def rack_R(self) -> Ints:
        """Rack of each rank."""
        return (np.arange(self.num_ranks) // (self.per_rack or self.num_ranks)).astype(np.int32)

    @property
    def num_nodes(self) -> int:
        """N."""
        return int(self.node_R[-1]) + 1

    def group_R(self, level: str) -> Ints:
        """Group of each rank at a level: "rank", "node" or "rack"."""
        return {"rank": np.arange(self.num_ranks, dtype=np.int32), "node": self.node_R, "rack": self.rack_R}[level]

    def counts(self, slot_LP: Ints) -> Ints:
        """Copies of each expert, int32 [L, E].

        Raises:
            ValueError: an expert has none.
        """
        return Placement(slot_LP, self.num_ranks).replicas(self.num_experts)[1]

    def as_placement(self, slot_LP: Ints) -> Placement:
        """With as many slots on every rank, those that a rank has not being -1."""
        size = int(self.slots_R.max())
        whole_LRS = np.full((len(slot_LP), self.num_ranks, size), -1, np.int32)
        has_RS = np.arange(size) < self.slots_R[:, None]
        whole_LRS[:, has_RS] = slot_LP
        return Placement(whole_LRS.reshape(len(slot_LP), -1), self.num_ranks)

    def of_placement(self, placement: Placement) -> Ints:
        """The slots that ranks have, of a placement with as many on every rank.

        Raises:
            ValueError: its slots are not those of the ranks.
        """
        size = int(self.slots_R.max())
        whole_LRS = placement.slot_expert_LP.reshape(len(placement.slot_expert_LP), placement.ep, -1)
        has_RS = np.arange(size) < self.slots_R[:, None]
        if whole_LRS.shape[1:] != has_RS.shape or ((whole_LRS >= 0) != has_RS).any():
            raise ValueError(
                f"placement: {whole_LRS.shape[1]} ranks of {whole_LRS.shape[2]} slots, wanted are {self.num_ranks} "
                f"ranks of {int(self.slots_R.min())} to {size}"
            )
        return np.ascontiguousarray(whole_LRS[:, has_RS])
