"""Full router scores for a trace that has only its choices and gate weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.routing.trace import RoutingTrace

_BLOCK = 4096


def gate_weights_TE(trace: RoutingTrace, layer: int) -> NDArray[np.float64]:
    """Gate weights of one layer by expert, [T, E]; 0 for those that a token did not choose.

    Raises:
        ValueError: the trace has no gate weights.
    """
    if trace.weights_TLK is None:
        raise ValueError(f"trace {trace.name!r} has no gate weights; one captured with weights would do")
    weight_TE = np.zeros((trace.num_tokens, trace.num_experts))
    ids_TK, weights_TK = trace.expert_ids_TLK[:, layer].astype(np.int64), trace.weights_TLK[:, layer]
    np.put_along_axis(weight_TE, ids_TK, weights_TK.astype(np.float64), axis=1)
    return weight_TE


def with_scores(trace: RoutingTrace, popularity_LE: NDArray[np.floating], rng: np.random.Generator) -> RoutingTrace:
    """The trace with scores [T, L, E] under which its own experts are the K best, in their order.

    Chosen experts score the log of their gate weight (a token without weights: even steps down from 0). The others
    score as losers of a Gumbel race, log popularity plus Gumbel noise, given that they stay below the last chosen one:
    -log(exp(-b) - log(u) / p) with b the last chosen score, p the popularity and u uniform. Source: truncated Gumbel
    variables, Maddison et al., A* sampling (arXiv 1411.0030).

    Args:
        popularity_LE: how often each expert is chosen, any scale; a layer may not be all 0.
    """
    T, L, K = trace.expert_ids_TLK.shape
    E = trace.num_experts
    share_LE = np.maximum(popularity_LE / popularity_LE.sum(axis=1, keepdims=True), 1e-6 / E)
    scores_TLE = np.empty((T, L, E), np.float16)
    for first in range(0, T, _BLOCK):
        ids_BLK = trace.expert_ids_TLK[first : first + _BLOCK].astype(np.int64)
        if trace.weights_TLK is None:
            chosen_BLK = np.broadcast_to(-0.5 * np.arange(K, dtype=np.float64), ids_BLK.shape)
        else:
            chosen_BLK = np.log(np.maximum(trace.weights_TLK[first : first + _BLOCK].astype(np.float64), 1e-7))
        uniform_BLE = rng.random((len(ids_BLK), L, E))
        bound_BL1 = chosen_BLK.min(axis=2, keepdims=True)
        block_BLE = -np.log(np.exp(-bound_BL1) - np.log(uniform_BLE) / share_LE)
        np.put_along_axis(block_BLE, ids_BLK, chosen_BLK, axis=2)
        scores_TLE[first : first + _BLOCK] = block_BLE
    return replace(trace, scores_TLE=scores_TLE)
