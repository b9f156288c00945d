"""Topics and drift: what a token's experts owe to the request it is in, and how that changes over time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.routing.clusters import k_means, squared_distances
from moesim.routing.load import Floats, Ints
from moesim.routing.structure import information_bits, joint_counts
from moesim.routing.trace import RoutingTrace

MOST_TOPICS = 8
MOST_REQUESTS = 512
_RESTARTS = 4
_DRAWS = 4


def request_information(trace: RoutingTrace, *, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """Mutual information of the request and the expert, of shuffled tokens, and the share of the entropy; [L] each.

    sum_re p(r, e) log2(p(r, e) / (p(r) p(e))) over all uses of experts, in bits; shuffled: the tokens are dealt to the
    requests anew, which shows how much of it is few tokens per request. The share is (real - shuffled) / H(expert), not
    below 0: how far the request explains the choice. Source: the uncertainty coefficient, Theil 1970, less its bias.
    """
    request_T, dealt_T = _request_T(trace), _request_T(trace)[_shuffled(trace, seed)]
    real, dealt, entropy = [], [], []
    for layer in range(trace.num_layers):
        ids_TK = trace.expert_ids_TLK[:, layer].astype(np.int64)
        real.append(information_bits(_load_NE(request_T, ids_TK, trace.num_experts)))
        dealt.append(information_bits(_load_NE(dealt_T, ids_TK, trace.num_experts)))
        entropy.append(_entropy_bits(np.bincount(ids_TK.ravel())[None])[0])
    real_L, dealt_L, entropy_L = np.asarray(real), np.asarray(dealt), np.asarray(entropy)
    share_L = np.divide(np.maximum(real_L - dealt_L, 0), entropy_L, out=np.zeros_like(real_L), where=entropy_L > 0)
    return real_L, dealt_L, share_L


@dataclass(frozen=True, eq=False)
class Topics:
    """Groups of requests that use the same experts.

    Attributes:
        num_topics: the number of groups with the best silhouette; 1 where no number beats that of shuffled tokens.
        silhouette_by_number: mean silhouette for 2, 3, ... groups: 1 well apart, 0 no groups at all.
        shuffled_by_number: the same when the tokens are dealt to the requests anew.
        topic_N: the group of each request that was clustered, numbered by falling size.
        requests_N: those requests, as numbered in the trace.
    """

    num_topics: int
    silhouette_by_number: dict[int, float]
    shuffled_by_number: dict[int, float]
    topic_N: Ints
    requests_N: Ints


def topics(trace: RoutingTrace, *, seed: int = 0) -> Topics:
    """Cluster the requests by the popularity of experts in them, all layers together.

    A request is the square roots of its shares of use (so that distances are Hellinger's), and is clustered by k-means
    with k-means++ starts, for k = 2 ... 8 (less than the number of requests; 512 requests at most, evenly spaced).
    Source: silhouette, Rousseeuw 1987; k-means++, Arthur and Vassilvitskii 2007.
    """
    request_T = _request_T(trace)
    num_requests = int(request_T[-1]) + 1
    chosen_N = np.unique(np.linspace(0, num_requests - 1, min(num_requests, MOST_REQUESTS)).astype(np.int64))
    names_N = np.unique(trace.request_T)[chosen_N].astype(np.int64)
    if len(chosen_N) < 3:
        return Topics(1, {}, {}, np.zeros(len(chosen_N), dtype=np.int64), names_N)
    real, groups = _silhouettes(_features_ND(trace, request_T, chosen_N), seed)
    dealt, _ = _silhouettes(_features_ND(trace, request_T[_shuffled(trace, seed)], chosen_N), seed)
    best = max(real, key=lambda number: real[number])
    if real[best] <= max(dealt.values()):
        return Topics(1, real, dealt, np.zeros(len(chosen_N), dtype=np.int64), names_N)
    by_size = np.argsort(-np.bincount(groups[best]), kind="stable").argsort()
    return Topics(best, real, dealt, by_size[groups[best]], names_N)


def drift_within_requests(trace: RoutingTrace, *, seed: int = 0) -> tuple[Floats, Floats]:
    """Jensen-Shannon divergence of the experts in the first and the second half of a request, and of random halves.

    Mean over the requests of at least two tokens, [L] both, in bits: 0 the same shares, 1 no expert in common. Halves
    of few tokens differ by chance; only what is above the random halves is drift. Source: Lin 1991.
    """
    request_T = _request_T(trace)
    num_requests = int(request_T[-1]) + 1
    place_T = np.arange(trace.num_tokens) - np.searchsorted(request_T, request_T)
    length_T = np.bincount(request_T)[request_T]
    is_long_N = np.bincount(request_T) >= 2

    def divergence_L(place_T: Ints) -> Floats:
        half_T = 2 * request_T + (2 * place_T >= length_T)
        found = [
            _divergence_bits(load_HE[::2][is_long_N], load_HE[1::2][is_long_N])
            for load_HE in _loads(trace, half_T, 2 * num_requests)
        ]
        return np.asarray([values_N.mean() if len(values_N) else np.nan for values_N in found])

    order_T = np.lexsort((np.random.default_rng(seed).random(trace.num_tokens), request_T))
    return divergence_L(place_T), divergence_L(place_T[order_T])


def drift_over_requests(trace: RoutingTrace, *, seed: int = 0) -> tuple[Floats, Floats]:
    """Jensen-Shannon divergence of the experts in the first and the second half of the requests, and of random halves.

    [L] both, bits; the random one is the mean over 4 draws of half of the requests. Where the requests of a trace are
    sorted by kind, this says how unlike the kinds are. NaN where there is one request. Source: Lin 1991.
    """
    request_T = _request_T(trace)
    num_requests = int(request_T[-1]) + 1
    if num_requests < 2:
        return np.full(trace.num_layers, np.nan), np.full(trace.num_layers, np.nan)
    random = np.random.default_rng(seed)
    late_N = np.arange(num_requests) >= (num_requests + 1) // 2
    draws_DN = np.stack([late_N, *(random.permutation(late_N) for _ in range(_DRAWS))])
    found = []
    for load_NE in _loads(trace, request_T, num_requests):
        late_DE = draws_DN.astype(np.int64) @ load_NE
        found.append(_divergence_bits(load_NE.sum(axis=0) - late_DE, late_DE))
    found_LD = np.asarray(found)
    return found_LD[:, 0], found_LD[:, 1:].mean(axis=1)


def _request_T(trace: RoutingTrace) -> Ints:
    """Requests numbered 0, 1, ... without gaps."""
    return np.unique(trace.request_T, return_inverse=True)[1].astype(np.int64)


def _shuffled(trace: RoutingTrace, seed: int) -> Ints:
    return np.random.default_rng(seed).permutation(trace.num_tokens)


def _load_NE(group_T: Ints, ids_TK: Ints, num_experts: int, num_groups: int | None = None) -> Ints:
    """Uses of each expert by each group of tokens."""
    groups = num_groups or int(group_T.max()) + 1
    return joint_counts(np.repeat(group_T, ids_TK.shape[1]), ids_TK.ravel(), num_experts, groups)


def _loads(trace: RoutingTrace, group_T: Ints, num_groups: int) -> Iterator[Ints]:
    """Uses by each group of tokens, [num_groups, E], layer by layer."""
    for layer in range(trace.num_layers):
        yield _load_NE(group_T, trace.expert_ids_TLK[:, layer].astype(np.int64), trace.num_experts, num_groups)


def _entropy_bits(counts_NE: NDArray[np.number]) -> Floats:
    """Entropy of each row of counts, bits."""
    share_NE = counts_NE / counts_NE.sum(axis=1, keepdims=True)
    return np.asarray(-(share_NE * np.log2(share_NE, out=np.zeros_like(share_NE), where=share_NE > 0)).sum(axis=1))


def _divergence_bits(one_NE: Ints, other_NE: Ints) -> Floats:
    """Jensen-Shannon divergence of the rows of two tables, each with weight 1/2."""
    p_NE = one_NE / one_NE.sum(axis=1, keepdims=True)
    q_NE = other_NE / other_NE.sum(axis=1, keepdims=True)
    return _entropy_bits((p_NE + q_NE) / 2) - (_entropy_bits(p_NE) + _entropy_bits(q_NE)) / 2


def _features_ND(trace: RoutingTrace, request_T: Ints, chosen_N: Ints) -> Floats:
    """Square roots of the shares of use of each chosen request, all layers side by side; a row has length 1."""
    num_requests = int(request_T.max()) + 1
    loads = [load_NE[chosen_N] for load_NE in _loads(trace, request_T, num_requests)]
    shares = [load_NE / load_NE.sum(axis=1, keepdims=True) for load_NE in loads]
    return np.sqrt(np.concatenate(shares, axis=1) / trace.num_layers)


def _silhouettes(features_ND: Floats, seed: int) -> tuple[dict[int, float], dict[int, Ints]]:
    """Mean silhouette, and the group of each row, for each number of groups."""
    distance_NN = np.sqrt(squared_distances(features_ND, features_ND))
    np.fill_diagonal(distance_NN, 0.0)
    silhouettes, groups = {}, {}
    for number in range(2, min(MOST_TOPICS, len(features_ND) - 1) + 1):
        random = np.random.default_rng((seed, number))
        runs = [k_means(features_ND, number, random) for _ in range(_RESTARTS)]
        groups[number] = min(runs, key=lambda run: run[0])[1]
        silhouettes[number] = _silhouette(distance_NN, groups[number])
    return silhouettes, groups


def _silhouette(distance_NN: Floats, group_N: Ints) -> float:
    """Mean over rows of (b - a) / max(a, b): a to the own group, b to the nearest other; 0 for a row alone."""
    names, group_N = np.unique(group_N, return_inverse=True)
    if len(names) < 2:
        return 0.0
    is_in_NC = np.eye(len(names))[group_N]
    size_C = is_in_NC.sum(axis=0)
    sums_NC = distance_NN @ is_in_NC
    rows = np.arange(len(group_N))
    own_N = sums_NC[rows, group_N] / np.maximum(size_C[group_N] - 1, 1)
    others_NC = sums_NC / size_C
    others_NC[rows, group_N] = np.inf
    nearest_N = others_NC.min(axis=1)
    larger_N = np.maximum(own_N, nearest_N)
    value_N = np.divide(nearest_N - own_N, larger_N, out=np.zeros_like(own_N), where=larger_N > 0)
    return float(np.where(size_C[group_N] > 1, value_N, 0.0).mean())
