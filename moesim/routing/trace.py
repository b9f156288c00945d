"""The routing trace: which experts every token chose, in every MoE layer of a real (or generated) run.

Shape letters, here and everywhere: T tokens, L MoE layers, E experts, K experts per token, R ranks, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORIGINS = ("trained", "random", "synthetic", "counts")
"""What made the routing: a trained router, an untrained one, a generator, or chance with a source's expert counts."""


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Routing of T tokens through L MoE layers, rows ordered by (request, position).

    Attributes:
        name: short name, as in reports.
        model: name of the model whose router this is, and what it imitates.
        origin: one of `ORIGINS`; a trace never hides whether its router was trained.
        num_experts: E, the same in every layer.
        expert_ids_TLK: uint8 or uint16 [T, L, K]; the experts a token was sent to, best first.
        request_T: int32 [T], non-decreasing.
        position_T: int32 [T], position of the token in its request, increasing inside one.
        is_decode_T: bool [T]; False for prompt tokens (prefill), True for generated ones.
        token_id_T: int32 [T], vocabulary id of the token; None where the source had none.
        weights_TLK: float16 [T, L, K] gate weights, or None where the source had none.
        predicted_HTLW: one array for each horizon h = 1, 2, ..., none where the source had none. Array h - 1 is
            uint8 or uint16 [T, L - h, W]; entry (t, l) holds the W experts, best first, that the router of layer
            l + h would choose from the hidden state that entered the router of layer l.
        scores_TLE: float16 [T, L, E], what the router gave each expert before its choice, or None.
        layers: indices, in the whole model, of the L MoE layers.
        provenance: where the trace comes from: source text, seed, versions, date, licence.
    """

    name: str
    model: str
    origin: str
    num_experts: int
    expert_ids_TLK: NDArray[np.unsignedinteger]
    request_T: NDArray[np.int32]
    position_T: NDArray[np.int32]
    is_decode_T: NDArray[np.bool_]
    token_id_T: NDArray[np.int32] | None
    layers: tuple[int, ...]
    weights_TLK: NDArray[np.float16] | None = None
    predicted_HTLW: tuple[NDArray[np.unsignedinteger], ...] = ()
    scores_TLE: NDArray[np.float16] | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.expert_ids_TLK.shape[0])

    @property
    def num_layers(self) -> int:
        """L, MoE layers only."""
        return int(self.expert_ids_TLK.shape[1])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.expert_ids_TLK.shape[2])

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_] | slice) -> RoutingTrace:
        """The trace of some of its tokens: row numbers in increasing order, a mask [T], or a slice."""
        return replace(
            self,
            expert_ids_TLK=self.expert_ids_TLK[rows],
            request_T=self.request_T[rows],
            position_T=self.position_T[rows],
            is_decode_T=self.is_decode_T[rows],
            token_id_T=None if self.token_id_T is None else self.token_id_T[rows],
            weights_TLK=None if self.weights_TLK is None else self.weights_TLK[rows],
            predicted_HTLW=tuple(ids_TLW[rows] for ids_TLW in self.predicted_HTLW),
            scores_TLE=None if self.scores_TLE is None else self.scores_TLE[rows],
        )


def joined(parts: Sequence[RoutingTrace]) -> RoutingTrace:
    """One trace from parts of one header and shape that follow each other, as `TraceGenerator.sample` gives them."""
    names = ("expert_ids_TLK", "request_T", "position_T", "is_decode_T", "token_id_T", "weights_TLK", "scores_TLE")
    whole: dict[str, Any] = {
        name: None if getattr(parts[0], name) is None else np.concatenate([getattr(part, name) for part in parts])
        for name in names
    }
    predicted = zip(*(part.predicted_HTLW for part in parts), strict=True)
    return replace(parts[0], **whole, predicted_HTLW=tuple(np.concatenate(ids) for ids in predicted))
