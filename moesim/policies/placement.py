"""Placement: which physical slot holds which expert? Decision: a `Placement` for one expert-parallel group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.layout import Placement


@dataclass(frozen=True)
class Contiguous:
    """Experts in index order, neighbours on one rank; redundant slots hold the first experts again.

    Source: the default of Megatron-LM, DeepSpeed-MoE (arXiv 2201.05596) and vLLM.
    """

    def place(self, num_layers: int, num_experts: int, num_slots: int, ep: int) -> Placement:
        """Slot p holds expert p mod E, in every layer."""
        slot_expert_P = np.arange(num_slots, dtype=np.int32) % num_experts
        return Placement(np.tile(slot_expert_P, (num_layers, 1)), ep)


@dataclass(frozen=True)
class RoundRobin:
    """Neighbouring experts on neighbouring ranks, shifted by one rank from layer to layer.

    Source: the round-robin expert placement strategy of vLLM.
    """

    def place(self, num_layers: int, num_experts: int, num_slots: int, ep: int) -> Placement:
        """Expert e of layer l lies on rank (e + l) mod ep."""
        slot = np.arange(num_slots)
        rank, index = slot // (num_slots // ep), slot % (num_slots // ep)
        layers = np.arange(num_layers)[:, None]
        slot_expert_LP = (index * ep + (rank - layers) % ep) % num_experts
        return Placement(slot_expert_LP.astype(np.int32), ep)


PLACEMENTS = {"contiguous": Contiguous, "round_robin": RoundRobin}
