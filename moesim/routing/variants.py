"""Routing variants of the literature: from what a router says of every expert to who is computed for whom.

Scores are float [T, E], as `RoutingTrace.scores_TLE` has them for a layer; where a trace has only the gate weights of
its K choices, `moesim.routing.scores.with_scores` draws the others. Rules that compare sums need probabilities
(`softmax`), all others any increasing function of them. Ties go to the lower expert id. Capacity is `capacity`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Routed:
    """Which experts compute which tokens, of any number for each token.

    Attributes:
        chosen_TE: bool [T, E], what is computed.
        is_free_E: bool [E], experts that compute nothing and are on every rank (null, zero, copy and constant ones).
        dropped_TE: bool [T, E], what the router chose and capacity refused.
    """

    chosen_TE: Mask
    is_free_E: Mask
    dropped_TE: Mask

    @classmethod
    def of(cls, chosen_TE: Mask, num_free: int = 0) -> Routed:
        """A routing that drops nothing, whose last `num_free` experts are free."""
        E = chosen_TE.shape[1]
        return cls(chosen_TE, np.arange(E) >= E - num_free, np.zeros_like(chosen_TE))

    @property
    def computed_TE(self) -> Mask:
        """bool [T, E], what costs anything: choices that are not free."""
        return self.chosen_TE & ~self.is_free_E

    @property
    def load_E(self) -> NDArray[np.int64]:
        """Tokens of each expert, [E]."""
        return np.asarray(self.chosen_TE.sum(axis=0), np.int64)

    @property
    def mean_experts(self) -> float:
        """Experts that compute something, per token."""
        return float(self.computed_TE.sum() / max(len(self.chosen_TE), 1))


def softmax(scores_TE: NDArray[np.floating]) -> Floats:
    """Probabilities [T, E] of logits or log probabilities."""
    shifted = np.asarray(scores_TE, np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def ranked(scores_TE: NDArray[np.floating]) -> NDArray[np.int64]:
    """Place of each expert in its token's order, [T, E]: 0 for the best."""
    order_TE = np.argsort(-np.asarray(scores_TE, np.float64), axis=-1, kind="stable")
    place_TE = np.empty_like(order_TE)
    np.put_along_axis(place_TE, order_TE, np.broadcast_to(np.arange(order_TE.shape[-1]), order_TE.shape), axis=-1)
    return place_TE


def top_k(scores_TE: NDArray[np.floating], k: int, num_free: int = 0) -> Routed:
    """The k best experts of each token; the last `num_free` of the E are free.

    Source: Shazeer et al. (arXiv 1701.06538). With free experts, AdaMoE (arXiv 2406.13233): the router has null
    experts beside the true ones, so that a token computes between 0 and k.

    Raises:
        ValueError: k is not in 0 to E, or `num_free` is not in 0 to E.
    """
    E = scores_TE.shape[1]
    if not 0 <= k <= E or not 0 <= num_free <= E:
        raise ValueError(f"a token chooses k = {k} of {E} experts, {num_free} of them free: both must be in 0 to {E}")
    return Routed.of(ranked(scores_TE) < k, num_free)


def top_p(probability_TE: Floats, p: float, max_k: int | None = None) -> Routed:
    """The fewest experts whose probabilities reach p, best first, at most `max_k`.

    Source: Dynamic MoE (arXiv 2403.07652); XMoE (arXiv 2403.18926) is this with small experts under `capacity.capped`.

    Raises:
        ValueError: p is not in (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"p = {p}: experts are taken until their probabilities reach p, which must be in (0, 1]")
    _T, E = probability_TE.shape
    place_TE = ranked(probability_TE)
    sorted_TE = -np.sort(-probability_TE, axis=1)
    before_TE = np.cumsum(sorted_TE, axis=1) - sorted_TE  # what the better ones have reached
    # At p = 1 rounding may leave the sum short of 1: all are taken, as far as they have any probability.
    needed_T = np.maximum(((before_TE < p - 1e-12) & (sorted_TE > 0)).sum(axis=1), 1)
    return Routed.of(place_TE < np.minimum(needed_T, max_k or E)[:, None])


def relu_gate(scores_TE: NDArray[np.floating], mean_k: float) -> Routed:
    """Every expert whose score is above one threshold, which is such that a token has `mean_k` of them in the mean.

    Exactly round(T mean_k) choices but for ties at the threshold, which are all left out. Source: ReMoE (arXiv
    2412.14711), a ReLU gate whose L1 coefficient is steered to the sparsity 1 - k / E.

    Raises:
        ValueError: `mean_k` is not in 0 to E.
    """
    T, E = scores_TE.shape
    if not 0 <= mean_k <= E:
        raise ValueError(f"mean_k = {mean_k}: a token has between 0 and {E} experts")
    wanted, flat = round(T * mean_k), np.sort(np.asarray(scores_TE, np.float64), axis=None)
    threshold = -np.inf if wanted == flat.size else flat[flat.size - wanted - 1]
    return Routed.of(np.asarray(scores_TE > threshold))


def skip_light(routed: Routed, probability_TE: Floats, ratio: float) -> Routed:
    """Leave out a token's experts whose probability is below `ratio` of its best choice's; the best always stays.

    Source: dynamic expert skipping, Lu et al. (arXiv 2402.14800), for k = 2; here for any k. Skipping by rank is
    `top_k` with a smaller k (arXiv 2505.03531).
    """
    weight_TE = np.where(routed.chosen_TE, probability_TE, -np.inf)
    kept_TE = routed.chosen_TE & (weight_TE >= ratio * weight_TE.max(axis=1, keepdims=True))
    return replace(routed, chosen_TE=kept_TE)


def task_level(probability_TE: Floats, task_T: NDArray[np.integer], k: int) -> Routed:
    """All tokens of a task (a request, a language) use the k experts that its tokens like best in the mean.

    Source: Kudugunta et al. (arXiv 2110.03742), which trains a router of task ids; here it is what the best such router
    for a token-level one would do.
    """
    tasks, index_T = np.unique(task_T, return_inverse=True)
    liked_QE = np.zeros((len(tasks), probability_TE.shape[1]))
    np.add.at(liked_QE, index_T, probability_TE)
    return Routed.of(top_k(liked_QE, k).chosen_TE[index_T])


def multi_head(scores_THE: NDArray[np.floating], k: int) -> Routed:
    """Each token is cut in H sub-tokens of a width h / H, routed by themselves: a `Routed` of T x H rows.

    Needs scores of sub-tokens, [T, H, E]; a trace of whole tokens has none. Source: MH-MoE (arXiv 2404.15045).
    """
    return top_k(scores_THE.reshape(-1, scores_THE.shape[2]), k)


def adjugate(routed: Routed, num_groups: int) -> Mask:
    """Groups of neighbouring experts that a token touches, bool [T, G]: each costs its adjugate expert once.

    Source: Grove MoE (arXiv 2508.07785).

    Raises:
        ValueError: `num_groups` does not divide the number of experts.
    """
    T, E = routed.chosen_TE.shape
    if num_groups < 1 or E % num_groups:
        raise ValueError(f"{E} experts do not fall into {num_groups} equal groups; a divisor of {E} would do")
    return np.asarray(routed.chosen_TE.reshape(T, num_groups, -1).any(axis=2))


def arithmetic_widths(first: int, last: int, num_experts: int) -> tuple[int, ...]:
    """Widths of heterogeneous experts in even steps, for `model.Experts.expert_widths`.

    Source: HMoE (arXiv 2408.10681): 9, 11, ... 23 of 128.

    Raises:
        ValueError: the steps are not whole numbers.
    """
    if num_experts < 2 or (last - first) % (num_experts - 1):
        raise ValueError(f"widths {first} to {last} in {num_experts} even steps are not whole numbers")
    return (
        tuple(range(first, last + 1, (last - first) // (num_experts - 1))) if last > first else (first,) * num_experts
    )
