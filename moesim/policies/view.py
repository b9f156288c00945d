"""What policies of expert offload may look at: the past, the layer that is being computed, and what was predicted.

Experts are numbered through all MoE layers where a policy speaks of single ones: `layer x E + expert`, a *place*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass
class View:
    """The state of one run that a policy may read; only a predictor writes, into `predicted_LE`.

    Attributes:
        num_layers, num_experts, top_k: L MoE layers, E experts in each, K chosen for a token.
        slots: experts that fit on the device.
        step: iterations before this one; is_prefill: whether this one computes prompts.
        request: number of the request whose tokens they are (the first of a batch).
        layer: MoE layer whose router has chosen, -1 before the first.
        ids: its chosen experts, most tokens first; load: tokens of each of them.
        scores_E: what its router gave each expert, summed over tokens; the weights of the chosen where the trace has
            no scores, their tokens where it has neither.
        guessed: for each horizon h = 1, 2, ... tokens whose guess of layer + h names each expert, [E].
        last_use_LE: int64, step of the last use, -1 for never; num_uses_LE: steps with a use.
        held_P: bool over places: on the device, or on its way there; coming_P: on its way.
        predicted_LE: expected use of experts in the layers to come of this step, 0 where nothing is said.
        confidence: how like what was matched for that is to what was seen, 0 to 1.
    """

    num_layers: int
    num_experts: int
    top_k: int
    slots: int = 0
    step: int = -1
    is_prefill: bool = False
    request: int = 0
    layer: int = -1
    ids: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    load: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    scores_E: Floats = field(default_factory=lambda: np.zeros(0))
    guessed: Sequence[Floats] = ()
    confidence: float = 1.0

    def __post_init__(self) -> None:
        shape = self.num_layers, self.num_experts
        self.last_use_LE = np.full(shape, -1, np.int64)
        self.num_uses_LE = np.zeros(shape, np.int64)
        self.held_P = np.zeros(self.num_layers * self.num_experts, np.bool_)
        self.coming_P = np.zeros_like(self.held_P)
        self.predicted_LE = np.zeros(shape)

    def not_here(self, first: int, last: int) -> NDArray[np.bool_]:
        """Which of the places first ... last - 1 are not on the device (yet)."""
        return np.asarray(~self.held_P[first:last] | self.coming_P[first:last])

    def mark_used(self) -> None:
        """Count the layer's experts as used."""
        self.last_use_LE[self.layer, self.ids] = self.step
        self.num_uses_LE[self.layer, self.ids] += 1
