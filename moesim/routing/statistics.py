"""What a routing trace looks like in numbers: balance, memory over tokens, memory over layers,
predictability.

Each measure stands beside the value it would have if tokens (or layers) chose independently with the same
popularity of experts, because a measure alone says little: a skewed router repeats itself by chance. Decode
and prefill count alike unless a docstring says otherwise. "Top-1" is a token's first, heaviest expert.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.routing.trace import RoutingTrace

Floats = NDArray[np.float64]


def expert_load_LE(trace: RoutingTrace) -> NDArray[np.int64]:
    """Assignments to each expert of each layer, [L, E]; a layer sums to T x K."""
    return _counts_LE(trace.expert_ids_TLK, trace.num_experts)


def load_skew_L(trace: RoutingTrace) -> Floats:
    """Load of the busiest expert over the mean load, [L]; 1 is even, E / K is one set for all tokens.

    max_e n_e / mean_e n_e. Source: the usual measure of imbalance; its inverse is the efficiency of a layer that
    waits for its busiest expert.
    """
    load_LE = expert_load_LE(trace)
    return np.asarray(load_LE.max(axis=1) / load_LE.mean(axis=1), dtype=np.float64)


def top1_repeat_L(trace: RoutingTrace) -> tuple[Floats, Floats]:
    """P(top-1 expert = that of the request's previous token), and the value for independent tokens; [L] both.

    Independent: sum_e p_e^2, with p_e the share of tokens whose top-1 is e. NaN where no token has a
    predecessor.
    Source: Mixtral of Experts (arXiv 2401.04088), table 5.
    """
    top_TL = trace.expert_ids_TLK[:, :, 0]
    follows = _follows(trace)
    popularity_LE = _counts_LE(top_TL[:, :, None], trace.num_experts) / trace.num_tokens
    return _mean(top_TL[1:][follows] == top_TL[:-1][follows]), np.square(popularity_LE).sum(axis=1)


def set_overlap_L(trace: RoutingTrace) -> tuple[Floats, Floats]:
    """Share of a token's K experts that its request's previous token chose too, and for independent tokens;
    [L].

    |S_t and S_(t-1)| / K; independent: sum_e q_e^2 / K, with q_e the share of tokens that choose e. NaN where
    no token has a predecessor. Source: "segment routing" measures of arXiv 2505.16056, at a segment of two
    tokens.
    """
    follows = _follows(trace)
    now, before = trace.expert_ids_TLK[1:][follows], trace.expert_ids_TLK[:-1][follows]
    shared_TL = np.zeros(now.shape[:2])
    for k in range(trace.top_k):
        shared_TL += (now == before[:, :, k, None]).any(axis=2)
    chosen_LE = expert_load_LE(trace) / trace.num_tokens
    return _mean(shared_TL / trace.top_k), np.square(chosen_LE).sum(axis=1) / trace.top_k


def token_affinity_L(trace: RoutingTrace) -> tuple[Floats, Floats]:
    """P(same top-1 expert) of two tokens of different requests with equal token id, and of any two; [L] both.

    The share of such pairs that agree, over all pairs: how far the token itself, not its surroundings, decides.
    NaN where there is no pair. Source: token-level routing of OpenMoE (arXiv 2402.01739), as a pair count.
    """
    top_TL = trace.expert_ids_TLK[:, :, 0].astype(np.int64)
    everything_T = np.zeros(trace.num_tokens, dtype=np.int64)
    _values, vocabulary_T = np.unique(trace.token_id_T, return_inverse=True)
    return _agreement_L(top_TL, vocabulary_T, trace), _agreement_L(top_TL, everything_T, trace)


def layer_information(trace: RoutingTrace, *, seed: int = 0) -> tuple[Floats, Floats]:
    """Mutual information of the top-1 experts of layers l and l + 1, and the same over shuffled tokens; [L -
    1], bits.

    sum_ab p(a, b) log2(p(a, b) / (p(a) p(b))). A sample of T tokens overstates it by about (E - 1)^2 / (2 T
    ln 2); the shuffled value shows by how much. Source: the affinity of ExFlow (arXiv 2401.08383), as
    information.
    """
    shuffled_T = np.random.default_rng(seed).permutation(trace.num_tokens)
    top_TL = trace.expert_ids_TLK[:, :, 0].astype(np.int64)
    pairs = [(top_TL[:, layer], top_TL[:, layer + 1]) for layer in range(trace.num_layers - 1)]
    real = [_information_bits(a, b, trace.num_experts) for a, b in pairs]
    shuffled = [_information_bits(a, b[shuffled_T], trace.num_experts) for a, b in pairs]
    return np.asarray(real), np.asarray(shuffled)


def prediction_recall(trace: RoutingTrace) -> tuple[Floats, Floats]:
    """Share of layer l + 1's K experts that layer l predicted, and that the K most popular experts cover; [L
    - 1].

    The first is NaN where the trace has no predictions. Source: speculative loading of Mixtral-offloading
    (arXiv 2312.17238), section 3.2.
    """
    true_TLK = trace.expert_ids_TLK[:, 1:]
    load_LE = expert_load_LE(trace)[1:]
    popular_L = np.sort(load_LE, axis=1)[:, -trace.top_k :].sum(axis=1) / load_LE.sum(axis=1)
    if not trace.predicted_HTLW:
        return np.full(trace.num_layers - 1, np.nan), popular_L
    hits_TL = np.zeros(true_TLK.shape[:2])
    for k in range(trace.top_k):
        hits_TL += (trace.predicted_HTLW[0][:, :, : trace.top_k] == true_TLK[:, :, k, None]).any(axis=2)
    return _mean(hits_TL / trace.top_k), popular_L


def prediction_top1_hit(trace: RoutingTrace) -> Floats:
    """Share of tokens whose first predicted expert of layer l + 1 is the true top-1, [L - 1]; NaN without
    any.
    """
    if not trace.predicted_HTLW:
        return np.full(trace.num_layers - 1, np.nan)
    return _mean(trace.predicted_HTLW[0][:, :, 0] == trace.expert_ids_TLK[:, 1:, 0])


def distinct_experts_L(trace: RoutingTrace, batch: int) -> tuple[Floats, float]:
    """Experts that a batch of `batch` decoding requests touches, mean over batches, [L]; and for even
    routing.

    A batch holds one token of each of `batch` requests, all at the same decode step, as continuous batching
    would meet them; requests are grouped in order, and what fills no batch is left out. NaN where no batch is
    full. A trace without decode is read as if its prompts were decoded. Even, independent: E (1 - (1 - K /
    E)^batch).

    Raises:
        ValueError: `batch` is not positive.
    """
    if batch < 1:
        raise ValueError(f"a batch needs at least 1 request; given {batch}")
    E = trace.num_experts
    even = float(E * (1 - (1 - trace.top_k / E) ** batch))
    tokens = np.flatnonzero(trace.is_decode_T) if trace.is_decode_T.any() else np.arange(trace.num_tokens)
    request = trace.request_T[tokens]
    first = np.searchsorted(request, request)
    step = np.arange(len(tokens)) - first
    tokens = tokens[np.lexsort((request, step))]
    sizes = np.bincount(step) // batch
    starts = np.cumsum(np.concatenate([[0], np.bincount(step)[:-1]]))
    touched = [
        _counts_LE(trace.expert_ids_TLK[tokens[start + b * batch : start + (b + 1) * batch]], E).astype(bool).sum(1)
        for start, full in zip(starts.tolist(), sizes.tolist(), strict=True)
        for b in range(full)
    ]
    return (_mean(np.asarray(touched)) if touched else np.full(trace.num_layers, np.nan)), even


def lru_hit_ratio_L(trace: RoutingTrace, capacity: int) -> Floats:
    """Share of expert uses that are among the layer's `capacity` most recently used ones, [L], requests in
    turn.

    A token asks for its K experts at once, so all are looked up before any is counted as used; within a token
    the later, lighter ones count as used last. Source: Mixtral-offloading (arXiv 2312.17238), figure 2.

    Raises:
        ValueError: `capacity` is not positive.
    """
    if capacity < 1:
        raise ValueError(f"a cache needs room for at least 1 expert; given {capacity}")
    L, E, K = trace.num_layers, trace.num_experts, trace.top_k
    used_at_LE = np.full((L, E), -1, dtype=np.int64)
    hits_L = np.zeros(L)
    room = min(capacity, E)
    for token, ids_LK in enumerate(trace.expert_ids_TLK.astype(np.int64)):
        oldest_kept_L = np.partition(used_at_LE, E - room, axis=1)[:, E - room]
        asked_LK = np.take_along_axis(used_at_LE, ids_LK, axis=1)
        hits_L += ((asked_LK >= oldest_kept_L[:, None]) & (asked_LK >= 0)).sum(axis=1)
        np.put_along_axis(used_at_LE, ids_LK, np.arange(token * K, token * K + K)[None, :], axis=1)
    return hits_L / (trace.num_tokens * K)


def statistics(trace: RoutingTrace) -> dict[str, Floats]:
    """All measures by name, [L] or [L - 1] (between layers); `..._by_chance` is the independent value
    beside.
    """
    repeat, repeat_by_chance = top1_repeat_L(trace)
    overlap, overlap_by_chance = set_overlap_L(trace)
    affinity, affinity_by_chance = token_affinity_L(trace)
    information, information_by_chance = layer_information(trace)
    recall, recall_by_popularity = prediction_recall(trace)
    measures = {
        "load_skew_ratio": load_skew_L(trace),
        "top1_repeat_rate": repeat,
        "top1_repeat_rate_by_chance": repeat_by_chance,
        "set_overlap_fraction": overlap,
        "set_overlap_fraction_by_chance": overlap_by_chance,
        "token_affinity_rate": affinity,
        "token_affinity_rate_by_chance": affinity_by_chance,
        "layer_information_bits": information,
        "layer_information_bits_by_chance": information_by_chance,
        "prediction_recall_fraction": recall,
        "prediction_recall_fraction_by_popularity": recall_by_popularity,
        "prediction_top1_hit_rate": prediction_top1_hit(trace),
    }
    for batch in (16, 64):
        distinct, even = distinct_experts_L(trace, batch)
        measures[f"num_distinct_experts_batch_{batch}"] = distinct
        measures[f"num_distinct_experts_batch_{batch}_by_chance"] = np.full(trace.num_layers, even)
    for share in (4, 2):
        capacity = max(1, trace.num_experts // share)
        measures[f"lru_hit_ratio_{capacity}_experts"] = lru_hit_ratio_L(trace, capacity)
    return measures


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


def _counts_LE(ids_TLK: NDArray[np.unsignedinteger], num_experts: int) -> NDArray[np.int64]:
    L = ids_TLK.shape[1]
    flat = ids_TLK.astype(np.int64) + (np.arange(L) * num_experts)[None, :, None]
    return np.bincount(flat.ravel(), minlength=L * num_experts).reshape(L, num_experts)


def _follows(trace: RoutingTrace) -> NDArray[np.bool_]:
    """[T - 1] True where token t + 1 is the next position of token t's request."""
    return np.asarray((np.diff(trace.request_T) == 0) & (np.diff(trace.position_T) == 1))


def _mean(values: NDArray[np.generic]) -> Floats:
    """Mean over the first axis; NaN, without a warning, where it is empty."""
    if len(values) == 0:
        return np.full(values.shape[1:], np.nan)
    return np.asarray(values.astype(np.float64).mean(axis=0))


def _information_bits(a: NDArray[np.int64], b: NDArray[np.int64], num_experts: int) -> float:
    joint = np.bincount(a * num_experts + b, minlength=num_experts**2).reshape(num_experts, num_experts) / len(a)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())
