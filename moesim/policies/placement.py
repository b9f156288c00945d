"""Placement: which physical slot holds which expert? Decision: a `Placement` for one expert-parallel group.

`place` is told the tokens of each expert in each layer on requests that are not those of the run; a policy with
`needs_load` is refused where there are none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.layout import Placement

Floats = NDArray[np.float64]


class Placer(Protocol):
    """What every placement policy has."""

    needs_load: ClassVar[bool]

    def place(self, num_slots: int, ep: int, per_node: int, load_LE: Floats) -> Placement:
        """Slots of `ep` ranks, `per_node` of them in a node, for experts with so many tokens."""
        ...


@dataclass(frozen=True)
class Contiguous:
    """Experts in index order, neighbours on one rank; redundant slots hold the first experts again.

    Source: the default of Megatron-LM, DeepSpeed-MoE (arXiv 2201.05596) and vLLM.
    """

    needs_load: ClassVar[bool] = False

    def place(self, num_slots: int, ep: int, per_node: int, load_LE: Floats) -> Placement:
        """Slot p holds expert p mod E, in every layer."""
        num_layers, num_experts = load_LE.shape
        slot_expert_P = np.arange(num_slots, dtype=np.int32) % num_experts
        return Placement(np.tile(slot_expert_P, (num_layers, 1)), ep)


@dataclass(frozen=True)
class RoundRobin:
    """Neighbouring experts on neighbouring ranks, shifted by one rank from layer to layer.

    Source: the round-robin expert placement strategy of vLLM.
    """

    needs_load: ClassVar[bool] = False

    def place(self, num_slots: int, ep: int, per_node: int, load_LE: Floats) -> Placement:
        """Expert e of layer l lies on rank (e + l) mod ep."""
        num_layers, num_experts = load_LE.shape
        slot = np.arange(num_slots)
        rank, index = slot // (num_slots // ep), slot % (num_slots // ep)
        layers = np.arange(num_layers)[:, None]
        slot_expert_LP = (index * ep + (rank - layers) % ep) % num_experts
        return Placement(slot_expert_LP.astype(np.int32), ep)


@dataclass(frozen=True)
class Eplb:
    """Copies for the busiest experts, and slots packed so that ranks are evenly busy.

    With expert groups that divide evenly among the nodes, groups are packed on nodes first, and copies stay in their
    node (hierarchical); else there is one node of one group (global).

    Source: DeepSeek's expert-parallel load balancer (github.com/deepseek-ai/EPLB); its published example is a test.
    """

    num_groups: int = 1
    needs_load: ClassVar[bool] = True

    def place(self, num_slots: int, ep: int, per_node: int, load_LE: Floats) -> Placement:
        """Layer by layer."""
        num_nodes = max(1, ep // per_node)
        if self.num_groups % num_nodes:
            num_groups, num_nodes = 1, 1
        else:
            num_groups = self.num_groups
        slots = [_balanced(load_E, num_slots, num_groups, num_nodes, ep) for load_E in load_LE]
        return Placement(np.array(slots, np.int32), ep)


def _packed(load_N: Floats, num_packs: int) -> list[list[int]]:
    """Items in packs of equal number: the heaviest first, each to the lightest pack that has room."""
    room, packs = len(load_N) // num_packs, [list[int]() for _ in range(num_packs)]
    weight = [0.0] * num_packs
    for item in np.argsort(-load_N, kind="stable").tolist():
        pack = min((p for p in range(num_packs) if len(packs[p]) < room), key=lambda p: weight[p])
        packs[pack].append(item)
        weight[pack] += float(load_N[item])
    return packs if room > 1 else [[item] for item in range(len(load_N))]


def _balanced(load_E: Floats, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int) -> list[int]:
    """The expert in each slot of one layer."""
    size, slots = len(load_E) // num_groups, []
    for groups in _packed(load_E.reshape(num_groups, size).sum(axis=1), num_nodes):
        expert_N = np.concatenate([np.arange(size) + group * size for group in groups])
        load_N, count_N = load_E[expert_N], np.ones(len(expert_N))
        copies = list(range(len(expert_N)))
        while len(copies) < num_slots // num_nodes:
            busiest = int(np.argmax(load_N / count_N))
            copies.append(busiest)
            count_N[busiest] += 1
        for pack in _packed((load_N / count_N)[copies], num_ranks // num_nodes):
            slots += [int(expert_N[copies[item]]) for item in pack]
    return slots


PLACEMENTS: dict[str, type[Placer]] = {"contiguous": Contiguous, "round_robin": RoundRobin, "eplb": Eplb}
