"""Who holds what: two rank grids over the same ranks (attention, experts), and the placement of experts.

Ranks are numbered with the last axis fastest: rank = (dp, cp, tp) for attention, (edp, ep, etp) for experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.mixers import Attention, LatentAttention
from moesim.model import ModelSpec


@dataclass(frozen=True)
class AttentionGrid:
    """Data-parallel groups of context-parallel groups of tensor-parallel ranks.

    cp: over how many ranks the tokens of a group are dealt out: of each prompt, or (in decode) of each cache.
    """

    dp: int = 1
    tp: int = 1
    cp: int = 1

    @property
    def num_ranks(self) -> int:
        """R."""
        return self.dp * self.cp * self.tp


@dataclass(frozen=True)
class ExpertGrid:
    """Replicated (edp) groups of expert-parallel (ep) ranks, each expert cut in `etp` slices."""

    edp: int = 1
    ep: int = 1
    etp: int = 1


@dataclass(frozen=True)
class Layout:
    """How a model lies on R ranks.

    pp: stages of a pipeline, each of which has both grids; ranks are numbered stage after stage.
    num_redundant_experts: physical copies beyond E in each expert-parallel group.
    num_shared_expert_ranks: ranks of each group that hold nothing but the shared expert, for the tokens of all; 0 has
        every rank compute it for its own tokens.
    """

    attention: AttentionGrid = field(default_factory=AttentionGrid)
    experts: ExpertGrid = field(default_factory=ExpertGrid)
    num_redundant_experts: int = 0
    num_shared_expert_ranks: int = 0
    pp: int = 1

    @property
    def num_ranks(self) -> int:
        """R: of all stages."""
        return self.pp * self.attention.num_ranks

    def mistakes(self, model: ModelSpec, num_ranks: int) -> list[str]:
        """What keeps this layout from fitting the model and the machine: one sentence per broken rule."""
        found = []
        a, e = self.attention, self.experts
        for key, value in [("pp", self.pp), *vars(a).items(), *vars(e).items()]:
            if value < 1:
                found.append(f"layout: {key} must be at least 1, given {value}")
        if self.num_redundant_experts < 0:
            found.append(f"layout: num_redundant_experts must be 0 or more, given {self.num_redundant_experts}")
        if found:
            return found
        if self.num_ranks != num_ranks:
            stages = f"pp = {self.pp} times " if self.pp > 1 else ""
            found.append(
                f"layout.attention: {stages}dp x cp x tp must equal the {num_ranks} devices of the machine, given "
                f"{a.dp} x {a.cp} x {a.tp} = {a.num_ranks}"
            )
        if self.pp > len(model.layers):
            found.append(
                f"layout: pp = {self.pp} stages for the {len(model.layers)} layers of {model.name}; at most as many"
            )
        if e.edp * e.ep * e.etp != a.num_ranks:
            found.append(
                f"layout.experts: edp x ep x etp must equal dp x cp x tp = {a.num_ranks}, given "
                f"{e.edp} x {e.ep} x {e.etp} = {e.edp * e.ep * e.etp}"
            )
        if e.ep > 1 and e.etp > 1:
            found.append("layout.experts: ep and etp are both above 1; set one of them to 1 (slices of spread experts)")
        if e.ep == 1 and e.etp != a.tp:
            found.append(
                f"layout.experts: with ep = 1 each tensor-parallel group holds all experts, so etp must be tp = "
                f"{a.tp}, given {e.etp}"
            )
        mixers = {layer.mixer for layer in model.layers if layer.mixer}
        if a.cp > 1 and not all(isinstance(mixer, Attention | LatentAttention) for mixer in mixers):
            found.append(
                f"layout.attention: cp = {a.cp}, but the states of {model.name} cannot be cut by tokens; set it to 1"
            )
        for mixer in mixers:
            if isinstance(mixer, Attention | LatentAttention) and mixer.num_heads % a.tp:
                found.append(
                    f"layout.attention: tp = {a.tp} does not divide the {mixer.num_heads} heads of {model.name}"
                )
                break
        if model.moe_layers:
            routed = model.experts
            slots, shared = routed.num_experts + self.num_redundant_experts, self.num_shared_expert_ranks
            if shared and (not routed.shared_width or slots != e.ep - shared):
                found.append(
                    f"layout.num_shared_expert_ranks: with {shared} ranks of the shared expert, {model.name} must have "
                    f"one, and the other {e.ep - shared} ranks one of {slots} experts each; "
                    f"num_redundant_experts = {e.ep - shared - routed.num_experts}, or 0 ranks would do"
                )
            elif slots % (e.ep - shared):
                fit = -routed.num_experts % e.ep
                found.append(
                    f"layout.experts: ep = {e.ep} does not divide {routed.num_experts} experts + "
                    f"{self.num_redundant_experts} redundant = {slots}; num_redundant_experts = {fit} would do"
                )
            if any(width % e.etp for width in routed.expert_widths):
                found.append(f"layout.experts: etp = {e.etp} does not divide the experts' width")
        return found


@dataclass(frozen=True, eq=False)
class Placement:
    """Physical expert slots of one expert-parallel group.

    slot_expert_LP: int32 [L, P], the expert in each slot, -1 where it holds none; slots of one rank are neighbours,
        P / ep of them.
    """

    slot_expert_LP: NDArray[np.int32]
    ep: int

    def replicas(self, num_experts: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Slots of each expert and how many there are.

        Returns:
            slots_LEX int32 [L, E, X], padded with -1, and num_replicas_LE int32 [L, E].

        Raises:
            ValueError: an expert has no slot in some layer.
        """
        num_layers, num_slots = self.slot_expert_LP.shape
        count_LE = np.zeros((num_layers, num_experts), np.int32)
        layer_F, slot_F = np.nonzero(self.slot_expert_LP >= 0)
        np.add.at(count_LE, (layer_F, self.slot_expert_LP[layer_F, slot_F]), 1)
        if (count_LE == 0).any():
            layer, expert = np.argwhere(count_LE == 0)[0]
            raise ValueError(f"placement: expert {expert} of MoE layer {layer} has no slot on any rank")
        slots_LEX = np.full((num_layers, num_experts, int(count_LE.max())), -1, np.int32)
        filled_LE = np.zeros_like(count_LE)
        layers = np.arange(num_layers)
        for slot in range(num_slots):
            held_L = layers[self.slot_expert_LP[:, slot] >= 0]
            expert_L = self.slot_expert_LP[held_L, slot]
            slots_LEX[held_L, expert_L, filled_LE[held_L, expert_L]] = slot
            filled_LE[held_L, expert_L] += 1
        return slots_LEX, count_LE

    def mistakes(self, num_layers: int, num_experts: int, num_slots: int) -> list[str]:
        """What keeps this from being the placement of a model's experts on ranks of a layout."""
        have, want = self.slot_expert_LP.shape, (num_layers, num_slots)
        if have != want:
            return [
                f"policies.placement: the map has {have[0]} layers of {have[1]} slots, the set-up {want[0]} of "
                f"{want[1]} "
                "(experts and redundant ones); use a map made for it"
            ]
        least, most = int(self.slot_expert_LP.min()), int(self.slot_expert_LP.max())
        if least < 0 or most >= num_experts:
            wrong = least if least < 0 else most
            return [f"policies.placement: the map has expert {wrong} in a slot; experts are 0 to {num_experts - 1}"]
        try:
            self.replicas(num_experts)
        except ValueError as error:
            return [f"policies.{error}; every expert needs one"]
        return []
