"""Structure inside a token: what its experts in one layer say about each other, and about those of later layers.

All information is in bits and stands beside the value of shuffled tokens, since a sample of T tokens overstates it:
by about (cells - 1 of each side, multiplied) / (2 T ln 2).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.routing.load import Floats, Ints
from moesim.routing.trace import RoutingTrace

_FITTING_ROUNDS = 60


def transitions_LEE(trace: RoutingTrace, horizon: int = 1) -> Ints:
    """Tokens whose top-1 is a in layer l and b in layer l + h, int64 [L - h, E, E].

    A row over its sum is P(b | a). Source: the inter-layer expert affinity of ExFlow (arXiv 2401.08383).

    Raises:
        ValueError: `horizon` is not positive.
    """
    check_horizon(horizon)
    top_TL = trace.expert_ids_TLK[:, :, 0].astype(np.int64)
    pairs = [joint_counts(a, b, trace.num_experts) for a, b in zip(top_TL.T, top_TL.T[horizon:], strict=False)]
    return np.asarray(pairs, dtype=np.int64).reshape(-1, trace.num_experts, trace.num_experts)


def layer_information(trace: RoutingTrace, horizon: int = 1, *, seed: int = 0) -> tuple[Floats, Floats]:
    """Mutual information of the top-1 experts of layers l and l + h, and that of shuffled tokens; [L - h], bits.

    sum_ab p(a, b) log2(p(a, b) / (p(a) p(b))). Source: the affinity of ExFlow (arXiv 2401.08383), as information.

    Raises:
        ValueError: `horizon` is not positive.
    """
    check_horizon(horizon)
    shuffled_T = np.random.default_rng(seed).permutation(trace.num_tokens)
    top_TL = trace.expert_ids_TLK[:, :, 0].astype(np.int64)
    pairs = [(top_TL[:, layer], top_TL[:, layer + horizon]) for layer in range(trace.num_layers - horizon)]
    real = [information_bits(joint_counts(a, b, trace.num_experts)) for a, b in pairs]
    shuffled = [information_bits(joint_counts(a, b[shuffled_T], trace.num_experts)) for a, b in pairs]
    return np.asarray(real), np.asarray(shuffled)


def coactivation_LEE(trace: RoutingTrace) -> Ints:
    """Tokens that choose both a and b in a layer, int64 [L, E, E], symmetric; the diagonal counts choices of a.

    A row over its diagonal is P(b | a). Source: expert co-activation of OLMoE (arXiv 2409.02060), section 5.2.
    """
    pairs = [_pairs_EE(trace.expert_ids_TLK[:, layer], trace.num_experts) for layer in range(trace.num_layers)]
    return np.asarray(pairs)


def coactivation_lift_LEE(trace: RoutingTrace) -> Floats:
    """Pairs of experts of one token over those of independent choice, [L, E, E]; NaN on the diagonal and where unused.

    1 is independent. A token cannot choose an expert twice, so independent is not p_a p_b but u_a u_b off the diagonal,
    with u such that each expert has as many partners as it has. Source: lift, Brin et al., SIGMOD 1997;
    quasi-independence, Goodman, JASA 63, 1968.
    """
    lift_LEE = np.full((trace.num_layers, trace.num_experts, trace.num_experts), np.nan)
    for lift_EE, pairs_EE in zip(lift_LEE, coactivation_LEE(trace), strict=True):
        partners_EE = _off_diagonal(pairs_EE)
        expected_EE = _quasi_independent(partners_EE)
        np.divide(partners_EE, expected_EE, out=lift_EE, where=expected_EE > 0)
    return lift_LEE


def coactivation_information_L(trace: RoutingTrace, *, seed: int = 0) -> tuple[Floats, Floats]:
    """What one expert of a token says about another of the same layer, and that of shuffled choices; [L], bits.

    sum_ab r_ab log2(r_ab / q_ab), with r_ab the share of the pairs of `coactivation_LEE` and q_ab that of independent
    choice (see `coactivation_lift_LEE`): the mean logarithm of the lift. Shuffled: the k-th experts of all tokens are
    dealt out anew for each k; a token that then has one twice loses that pair. NaN where K is 1.
    """
    random = np.random.default_rng(seed)
    L, T, K = trace.num_layers, trace.num_tokens, trace.top_k
    if K < 2:
        return np.full(L, np.nan), np.full(L, np.nan)
    dealt_TK = np.stack([random.permutation(T) for _ in range(K)], axis=1)
    real, dealt = [], []
    for layer in range(L):
        ids_TK = trace.expert_ids_TLK[:, layer]
        real.append(_pair_information_bits(_pairs_EE(ids_TK, trace.num_experts)))
        dealt_ids_TK = np.take_along_axis(ids_TK, dealt_TK, axis=0)
        dealt.append(_pair_information_bits(_pairs_EE(dealt_ids_TK, trace.num_experts)))
    return np.asarray(real), np.asarray(dealt)


def check_horizon(horizon: int) -> None:
    """Refuse a horizon that does not look ahead."""
    if horizon < 1:
        raise ValueError(f"a horizon is at least 1 layer; given {horizon}")


def joint_counts(a: NDArray[np.int64], b: NDArray[np.int64], num_experts: int, num_groups: int | None = None) -> Ints:
    """Times that a (a group, or an expert) meets expert b, int64 [num_groups or E, E]."""
    rows = num_groups or num_experts
    return np.bincount(a * num_experts + b, minlength=rows * num_experts).reshape(rows, num_experts)


def information_bits(counts: Ints) -> float:
    """Mutual information of the row and the column of a table of counts, bits; 0 for an empty one."""
    joint = counts / max(counts.sum(), 1)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def _pairs_EE(ids_TK: NDArray[np.unsignedinteger], num_experts: int) -> Ints:
    """Ordered pairs of the experts of each token; the diagonal counts choices (and an id that comes twice)."""
    columns = ids_TK.T.astype(np.int64)
    pairs_EE = np.diag(np.bincount(columns.ravel(), minlength=num_experts))
    for k, column in enumerate(columns):
        for other in columns[:k]:
            ordered_EE = joint_counts(column, other, num_experts)
            pairs_EE = pairs_EE + ordered_EE + ordered_EE.T
    return pairs_EE


def _off_diagonal(pairs_EE: Ints) -> Ints:
    return pairs_EE - np.diag(np.diag(pairs_EE))


def _quasi_independent(pairs_EE: Ints) -> Floats:
    """u_a u_b off the diagonal, with the row sums of `pairs_EE` (symmetric, diagonal 0): iterative scaling."""
    partners_E = pairs_EE.sum(axis=1).astype(np.float64)
    u_E = partners_E / np.sqrt(max(partners_E.sum(), 1.0))
    for _ in range(_FITTING_ROUNDS):
        reached_E = u_E * (u_E.sum() - u_E)
        u_E *= np.sqrt(np.divide(partners_E, reached_E, out=np.zeros_like(u_E), where=reached_E > 0))
    expected_EE = np.outer(u_E, u_E)
    np.fill_diagonal(expected_EE, 0.0)
    return expected_EE


def _pair_information_bits(pairs_EE: Ints) -> float:
    pairs_EE = _off_diagonal(pairs_EE)
    expected_EE = _quasi_independent(pairs_EE)
    seen = pairs_EE > 0
    lift = pairs_EE[seen] / expected_EE[seen]
    return float((pairs_EE[seen] * np.log2(lift)).sum() / pairs_EE.sum())
