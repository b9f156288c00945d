"""Locality: what a token's experts owe to the tokens before it, and to which token it is.

Top-1 is a token's first, heaviest expert. Each measure stands beside its value for tokens that choose independently
with the same popularity of experts, because a skewed router repeats itself by chance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.routing.load import Floats, counts_LE, expert_load_LE
from moesim.routing.trace import RoutingTrace


def top1_repeat_L(trace: RoutingTrace) -> tuple[Floats, Floats]:
    """P(top-1 expert = that of the request's previous token), and the value for independent tokens; [L] both.

    Independent: sum_e p_e^2, with p_e the share of tokens whose top-1 is e. NaN where no token has a predecessor.
    Source: Mixtral of Experts (arXiv 2401.04088), table 5.
    """
    top_TL = trace.expert_ids_TLK[:, :, 0]
    follows = _follows(trace)
    popularity_LE = counts_LE(top_TL[:, :, None], trace.num_experts) / trace.num_tokens
    return mean_over_first(top_TL[1:][follows] == top_TL[:-1][follows]), np.square(popularity_LE).sum(axis=1)


def set_overlap_L(trace: RoutingTrace) -> tuple[Floats, Floats]:
    """Share of a token's K experts that its request's previous token chose too, and for independent tokens; [L].

    |S_t and S_(t-1)| / K; independent: sum_e q_e^2 / K, with q_e the share of tokens that choose e. NaN where no token
    has a predecessor. Source: "segment routing" measures of arXiv 2505.16056, at a segment of two tokens.
    """
    follows = _follows(trace)
    now, before = trace.expert_ids_TLK[1:][follows], trace.expert_ids_TLK[:-1][follows]
    shared_TL = np.zeros(now.shape[:2])
    for k in range(trace.top_k):
        shared_TL += (now == before[:, :, k, None]).any(axis=2)
    chosen_LE = expert_load_LE(trace) / trace.num_tokens
    return mean_over_first(shared_TL / trace.top_k), np.square(chosen_LE).sum(axis=1) / trace.top_k


def token_affinity_L(trace: RoutingTrace) -> tuple[Floats, Floats]:
    """P(same top-1 expert) of two tokens of different requests with equal token id, and of any two; [L] both.

    The share of such pairs that agree, over all pairs: how far the token itself, not its surroundings, decides. NaN
    where there is no pair, and the first where the trace has no token ids. Source: token-level routing of OpenMoE
    (arXiv 2402.01739), as a pair count.
    """
    top_TL = trace.expert_ids_TLK[:, :, 0].astype(np.int64)
    everything_T = np.zeros(trace.num_tokens, dtype=np.int64)
    any_two_L = _agreement_L(top_TL, everything_T, trace)
    if trace.token_id_T is None:
        return np.full(trace.num_layers, np.nan), any_two_L
    _values, vocabulary_T = np.unique(trace.token_id_T, return_inverse=True)
    return _agreement_L(top_TL, vocabulary_T, trace), any_two_L


def mean_over_first(values: NDArray[np.generic]) -> Floats:
    """Mean over the first axis; NaN, without a warning, where it is empty."""
    if len(values) == 0:
        return np.full(values.shape[1:], np.nan)
    return np.asarray(values.astype(np.float64).mean(axis=0))


def _agreement_L(top_TL: NDArray[np.int64], group_T: NDArray[np.int64], trace: RoutingTrace) -> Floats:
    """Share of pairs within a group, but of different requests, that have the same top-1, [L]."""
    request_T = np.unique(trace.request_T, return_inverse=True)[1]
    in_request_T = group_T * (request_T.max() + 1) + request_T
    pairs = _equal_pairs(group_T) - _equal_pairs(in_request_T)
    E, L = trace.num_experts, trace.num_layers
    agree = [
        _equal_pairs(group_T * E + top_TL[:, layer]) - _equal_pairs(in_request_T * E + top_TL[:, layer])
        for layer in range(L)
    ]
    return np.asarray(agree, dtype=np.float64) / pairs if pairs else np.full(L, np.nan)


def _equal_pairs(values: NDArray[np.int64]) -> int:
    """Ordered pairs of equal values, a value with itself included."""
    return int(np.square(np.unique(values, return_counts=True)[1]).sum())


def _follows(trace: RoutingTrace) -> NDArray[np.bool_]:
    """[T - 1] True where token t + 1 is the next position of token t's request."""
    return np.asarray((np.diff(trace.request_T) == 0) & (np.diff(trace.position_T) == 1))
