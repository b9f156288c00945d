"""What the tokens of some requests ask of experts: the numbers that a placement is made and judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.routing.trace import RoutingTrace

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]


@njit(cache=True)
def _count(ids_TLK, step_T, load_SLE, next_LEE, together_LEE):  # type: ignore[no-untyped-def]
    num_tokens, num_layers, top_k = ids_TLK.shape
    for t in range(num_tokens):
        for layer in range(num_layers):
            for i in range(top_k):
                e = ids_TLK[t, layer, i]
                load_SLE[step_T[t], layer, e] += 1
                for j in range(top_k):
                    if j != i:
                        together_LEE[layer, e, ids_TLK[t, layer, j]] += 1
                    if layer + 1 < num_layers:
                        next_LEE[layer, e, ids_TLK[t, layer + 1, j]] += 1


@dataclass(frozen=True, eq=False)
class Demand:
    """Counts of T tokens.

    load_SLE: float64 [S, L, E], tokens of each expert in each step.
    next_LEE: float32 [L - 1, E, E], pairs of a choice in a layer and a choice of the same token in the next layer.
    together_LEE: float32 [L, E, E], tokens that choose both of two experts, on the diagonal 0.
    ids_TLK, request_T: the choices themselves, and the request of each token.
    """

    load_SLE: Floats
    next_LEE: Singles
    together_LEE: Singles
    ids_TLK: NDArray[np.unsignedinteger]
    request_T: NDArray[np.int32]

    @classmethod
    def of(cls, trace: RoutingTrace, rows: NDArray[np.int64] | None = None, tokens_per_step: int = 4096) -> Demand:
        """Of some tokens of a trace, all if None.

        A step has `tokens_per_step` tokens (the last one may have fewer): generated ones of all requests side by side,
        as in decoding, after prompts one by one.
        """
        rows = np.arange(trace.num_tokens) if rows is None else np.asarray(rows)
        decodes, request, position = trace.is_decode_T[rows], trace.request_T[rows], trace.position_T[rows]
        order = np.lexsort((np.where(decodes, request, position), np.where(decodes, position, request), decodes))
        ids_TLK, num_tokens = trace.expert_ids_TLK[rows[order]], len(rows)
        num_steps = max(1, round(num_tokens / tokens_per_step))
        step_T = np.minimum(np.arange(num_tokens) // max(1, tokens_per_step), num_steps - 1)
        num_layers, num_experts = trace.num_layers, trace.num_experts
        load_SLE = np.zeros((num_steps, num_layers, num_experts))
        next_LEE = np.zeros((max(num_layers - 1, 0), num_experts, num_experts), np.float32)
        together_LEE = np.zeros((num_layers, num_experts, num_experts), np.float32)
        _count(ids_TLK, step_T, load_SLE, next_LEE, together_LEE)
        return cls(load_SLE, next_LEE, together_LEE, ids_TLK, request[order])

    @classmethod
    def of_load(cls, load_LE: Floats) -> Demand:
        """Of loads alone, as counts give them: nothing is known of what goes together."""
        num_layers, num_experts = load_LE.shape
        empty = np.zeros((0, num_experts, num_experts), np.float32)
        no_ids, no_requests = np.zeros((0, num_layers, 1), np.uint8), np.zeros(0, np.int32)
        return cls(np.asarray(load_LE, np.float64)[None], empty, empty, no_ids, no_requests)

    @property
    def has_pairs(self) -> bool:
        """Whether it is known what goes together."""
        return len(self.ids_TLK) > 0

    @property
    def load_LE(self) -> Floats:
        """Tokens of each expert, [L, E]."""
        return np.asarray(self.load_SLE.sum(axis=0))

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.load_SLE.shape[1])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.load_SLE.shape[2])
