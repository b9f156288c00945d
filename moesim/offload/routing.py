"""What the routers of one step chose, from rows of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.policies.view import View
from moesim.routing.trace import RoutingTrace

Floats = NDArray[np.float64]

_BEHIND = 1e-3
"""Worth of a guess that is behind the k first ones, in guesses that are among them."""


@dataclass(frozen=True, eq=False)
class Routing:
    """What the routers of one step chose.

    load_LE: tokens of each expert. scores_LE: see `View.scores_E`. guessed: see `View.guessed`, [L - h, E] each.
    """

    load_LE: NDArray[np.int64]
    scores_LE: Floats
    guessed: Sequence[Floats] = ()
    request: int = 0
    is_prefill: bool = False

    def begin(self, view: View) -> None:
        """The step begins: nothing is predicted yet."""
        view.step += 1
        view.layer, view.request, view.is_prefill = -1, self.request, self.is_prefill
        view.predicted_LE[:] = 0.0

    def show(self, view: View, layer: int, computes_E: NDArray[np.bool_] | None = None) -> None:
        """A layer's router has chosen; `computes_E`: experts that have weights, all where it is None."""
        load_E = self.load_LE[layer]
        (ids,) = load_E.nonzero() if computes_E is None else (computes_E & (load_E > 0)).nonzero()
        ids = ids[np.argsort(-load_E[ids], kind="stable")]
        view.layer, view.ids, view.load = layer, ids, load_E[ids]
        view.scores_E = self.scores_LE[layer]
        view.guessed = [guessed_LE[layer] for guessed_LE in self.guessed if layer < len(guessed_LE)]


def counted_LE(ids_TLK: NDArray[np.unsignedinteger], num_experts: int, weights: Floats | None = None) -> NDArray[Any]:
    """How often each expert of each layer was named, or with what weight in all, [L, E]."""
    num_layers = ids_TLK.shape[1]
    place_TLK = ids_TLK + num_experts * np.arange(num_layers)[:, None]
    flat = None if weights is None else weights.ravel()
    return np.bincount(place_TLK.ravel(), flat, num_layers * num_experts).reshape(num_layers, num_experts)


def routing_of(
    trace: RoutingTrace, rows: NDArray[np.int64], load_LE: NDArray[np.int64], request: int = 0, is_prefill: bool = False
) -> Routing:
    """What the routers of the tokens in those rows chose, scored, and guessed."""
    E = trace.num_experts
    if trace.scores_TLE is not None:
        scores_LE = trace.scores_TLE[rows].sum(axis=0, dtype=np.float64)
    elif trace.weights_TLK is not None:
        scores_LE = counted_LE(trace.expert_ids_TLK[rows], E, trace.weights_TLK[rows].astype(np.float64))
    else:
        scores_LE = load_LE.astype(np.float64)
    guessed: list[Floats] = []
    for ids_TLW in trace.predicted_HTLW:
        ids_BLW = ids_TLW[rows]
        weight_W = np.where(np.arange(ids_BLW.shape[2]) < trace.top_k, 1.0, _BEHIND)
        guessed.append(counted_LE(ids_BLW, E, np.broadcast_to(weight_W, ids_BLW.shape)))
    return Routing(load_LE, scores_LE, guessed, request, is_prefill)
