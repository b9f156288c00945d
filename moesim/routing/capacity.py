"""Expert capacity: how many tokens an expert takes, and which of those that want it.

Whether a request's routing depends on the requests beside it is decided here: it does as soon as tokens of several
requests compete for the same places (a *group* that holds more than one request), and never otherwise. Source: Hayes et
al., Buffer overflow in mixture of experts (arXiv 2402.05526).
"""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from moesim.routing.variants import Routed, ranked

ORDERS = ("position", "choice", "priority", "random")
"""Who comes first to an expert: earlier tokens (Switch, arXiv 2101.03961); all first choices before all second ones,
each by position (GShard, arXiv 2006.16668); tokens with a higher best score (batch-prioritised routing, V-MoE, arXiv
2106.05974); anyone, by lot."""


def capacity(factor: float, num_tokens: int, k: float, num_experts: int) -> int:
    """Places of an expert, ceil(factor T k / E). Source: Switch Transformer (arXiv 2101.03961), equation 3, any k."""
    return ceil(factor * num_tokens * k / num_experts - 1e-9)


def capped(
    routed: Routed,
    scores_TE: NDArray[np.floating],
    capacity_E: NDArray[np.integer] | int,
    order: str = "position",
    group_T: NDArray[np.integer] | None = None,
    seed: int = 0,
) -> Routed:
    """What is left of a routing when an expert has `capacity_E` places in each group of tokens; the rest is dropped.

    A token that is dropped everywhere passes by the layer on the residual path alone.

    Args:
        order: one of `ORDERS`.
        group_T: tokens that compete with each other (a device, a sequence, a request), all of them by default.
        seed: of the order "random".

    Raises:
        ValueError: an unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"order {order!r}: one of {', '.join(ORDERS)} would do")
    T, E = routed.chosen_TE.shape
    token_A, expert_A = np.nonzero(routed.chosen_TE)
    group_A = np.zeros_like(token_A) if group_T is None else np.asarray(group_T)[token_A]
    first_A = _first_comes(order, np.asarray(scores_TE, np.float64), seed)[token_A, expert_A]
    sequence = np.lexsort((token_A, first_A, group_A, expert_A))
    key = np.stack([expert_A[sequence], group_A[sequence]])
    is_first = np.r_[True, (key[:, 1:] != key[:, :-1]).any(axis=0)][: len(sequence)]
    start = np.maximum.accumulate(np.where(is_first, np.arange(len(sequence)), 0))
    fits = np.arange(len(sequence)) - start < np.broadcast_to(capacity_E, E)[expert_A[sequence]]
    kept_TE = np.zeros((T, E), np.bool_)
    kept_TE[token_A[sequence[fits]], expert_A[sequence[fits]]] = True
    return Routed(kept_TE, routed.is_free_E, routed.dropped_TE | (routed.chosen_TE & ~kept_TE))


def _first_comes(order: str, scores_TE: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """What an expert's queue is sorted by, [T, E], before position."""
    if order == "choice":
        return ranked(scores_TE).astype(np.float64)
    key_T = np.zeros(len(scores_TE))
    if order == "priority":
        key_T = -scores_TE.max(axis=1)
    elif order == "random":
        key_T = np.random.default_rng(seed).random(len(scores_TE))
    return np.broadcast_to(key_T[:, None], scores_TE.shape)


def expert_choice(scores_TE: NDArray[np.floating], places: int) -> Routed:
    """Every expert takes the `places` tokens that score it highest: all loads are equal, a token may have any number.

    Needs the whole batch, so it is not causal. Source: Zhou et al. (arXiv 2202.09368), with `capacity` places.

    Raises:
        ValueError: there are fewer tokens than places.
    """
    T, _E = scores_TE.shape
    if not 0 <= places <= T:
        raise ValueError(f"an expert that chooses {places} tokens needs as many; given {T}")
    return Routed.of(places > ranked(np.ascontiguousarray(scores_TE.T)).T)


def moe_plus_plus_capacity(tau: float, gamma: float, num_tokens: int, num_ffn: int, num_free: int) -> NDArray[np.int64]:
    """Places of the `num_ffn` experts and of the zero-computation ones after them, [E].

    gamma tau T / (tau N_F + N_Z) and gamma T / (tau N_F + N_Z), rounded up: at a tau below 1 tokens are pushed to the
    experts that cost nothing. Source: MoE++ (arXiv 2410.07348).
    """
    shared = gamma * num_tokens / (tau * num_ffn + num_free)
    return np.array([ceil(tau * shared - 1e-9)] * num_ffn + [ceil(shared - 1e-9)] * num_free, np.int64)


def moe_plus_plus_share(tau: float, num_ffn: int, num_free: int) -> float:
    """Share of the choices that go to experts that compute, when all are balanced: tau N_F / (tau N_F + N_Z)."""
    return tau * num_ffn / (tau * num_ffn + num_free)
