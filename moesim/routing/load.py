"""Load: how evenly the experts, and the ranks that hold them, are used, over a trace and in batches of it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.routing.trace import RoutingTrace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def expert_load_LE(trace: RoutingTrace) -> Ints:
    """Assignments to each expert of each layer, [L, E]; a layer sums to T x K."""
    return counts_LE(trace.expert_ids_TLK, trace.num_experts)


def load_skew_L(trace: RoutingTrace) -> Floats:
    """Load of the busiest expert over the mean load, [L]; 1 is even, E / K is one set for all tokens.

    max_e n_e / mean_e n_e. Source: the usual measure of imbalance; its inverse is the efficiency of a layer that
    waits for its busiest expert.
    """
    load_LE = expert_load_LE(trace)
    return np.asarray(load_LE.max(axis=1) / load_LE.mean(axis=1), dtype=np.float64)


def decode_rows(trace: RoutingTrace) -> Ints:
    """Rows of the decode tokens; of all tokens where a trace has no decode, as if its prompts were decoded."""
    return np.flatnonzero(trace.is_decode_T) if trace.is_decode_T.any() else np.arange(trace.num_tokens)


def batches(trace: RoutingTrace, batch: int) -> Ints:
    """Rows of the tokens that decode together, int64 [N, batch]: N batches, of step 0 first, then of step 1, ...

    A batch holds one token of each of `batch` requests, all at the same decode step; requests are grouped in order,
    and what fills no batch is left out. A trace without decode is read as if its prompts were decoded.

    Raises:
        ValueError: `batch` is not positive.
    """
    if batch < 1:
        raise ValueError(f"a batch needs at least 1 request; given {batch}")
    rows = decode_rows(trace)
    request = trace.request_T[rows]
    step = np.arange(len(rows)) - np.searchsorted(request, request)
    rows = rows[np.lexsort((request, step))]
    running_S = np.bincount(step)
    is_full = np.arange(len(rows)) - np.repeat(np.cumsum(running_S) - running_S, running_S) < np.repeat(
        running_S // batch * batch, running_S
    )
    return np.asarray(rows[is_full].reshape(-1, batch), dtype=np.int64)


def shuffled_batches(trace: RoutingTrace, batch: int, *, seed: int = 0) -> Ints:
    """As many batches as `batches` has, of decode tokens drawn without regard to request and step, [N, batch]."""
    num_batches = len(batches(trace, batch))
    return np.random.default_rng(seed).permutation(decode_rows(trace))[: num_batches * batch].reshape(-1, batch)


def distinct_experts_L(trace: RoutingTrace, batch: int) -> tuple[Floats, float]:
    """Experts that a batch of `batch` decoding requests touches, mean over `batches`, [L]; and for even routing.

    NaN where no batch is full. Even, independent: E (1 - (1 - K / E)^batch).

    Raises:
        ValueError: `batch` is not positive.
    """
    E = trace.num_experts
    even = float(E * (1 - (1 - trace.top_k / E) ** batch)) if batch > 0 else np.nan
    return _over_batches_L(trace, batches(trace, batch), E)[0], even


def rank_imbalance_L(trace: RoutingTrace, ep: int, batch: int | None = None) -> Floats:
    """Load of the busiest of `ep` ranks over the mean, [L], 1 is even; of the trace, or the mean over its `batches`.

    max_r n_r / mean_r n_r, with n_r the assignments (a token counts once for each of its experts) to the E / ep
    experts e of rank r = floor(e ep / E). NaN where no batch is full. Source: the balancedness of DeepSeek's EPLB and
    of SGLang, inverted (theirs is mean / max).

    Raises:
        ValueError: `ep` does not divide the number of experts, or `batch` is not positive.
    """
    _check_ep(trace, ep)
    if batch is None:
        load_LR = expert_load_LE(trace).reshape(trace.num_layers, ep, -1).sum(axis=2)
        return np.asarray(load_LR.max(axis=1) / load_LR.mean(axis=1))
    return _over_batches_L(trace, batches(trace, batch), ep)[1]


def rank_imbalance_by_chance_L(trace: RoutingTrace, ep: int, batch: int) -> Floats:
    """`rank_imbalance_L` of `shuffled_batches`, [L]: the same experts, but no requests and steps.

    Raises:
        ValueError: `ep` does not divide the number of experts, or `batch` is not positive.
    """
    _check_ep(trace, ep)
    return _over_batches_L(trace, shuffled_batches(trace, batch), ep)[1]


def counts_LE(ids_TLK: NDArray[np.unsignedinteger], num_experts: int) -> Ints:
    """Occurrences of each id in each layer, [L, E]."""
    L = ids_TLK.shape[1]
    flat = ids_TLK.astype(np.int64) + (np.arange(L) * num_experts)[None, :, None]
    return np.bincount(flat.ravel(), minlength=L * num_experts).reshape(L, num_experts)


def sizes_that_fit(trace: RoutingTrace, wanted: Iterable[int]) -> tuple[int, ...]:
    """Those of some expert-parallel sizes that divide the number of experts."""
    return tuple(ep for ep in wanted if trace.num_experts % ep == 0)


def _check_ep(trace: RoutingTrace, ep: int) -> None:
    if ep < 1 or trace.num_experts % ep:
        fit = [size for size in range(1, trace.num_experts + 1) if trace.num_experts % size == 0]
        raise ValueError(
            f"ep {ep}: each rank holds E / ep experts, so ep must divide the {trace.num_experts} experts of "
            f"trace {trace.name!r}; one of {', '.join(map(str, fit))} would do"
        )


def _over_batches_L(trace: RoutingTrace, rows_NB: Ints, num_groups: int) -> tuple[Floats, Floats]:
    """Mean over batches of the groups of experts that are used, and of the fullest group over the mean, [L] both."""
    if not len(rows_NB):
        return np.full(trace.num_layers, np.nan), np.full(trace.num_layers, np.nan)
    used_L, fullest_L = _count_batches(trace.expert_ids_TLK, rows_NB, trace.num_experts // num_groups, num_groups)
    mean_load = rows_NB.shape[1] * trace.top_k / num_groups
    return used_L / len(rows_NB), fullest_L / (len(rows_NB) * mean_load)


@njit(cache=True)
def _count_batches(ids_TLK, rows_NB, group_size, num_groups):  # type: ignore[no-untyped-def]
    """Sums over batches of the number of groups used, and of the load of the fullest one, [L] both."""
    num_layers, top_k = ids_TLK.shape[1], ids_TLK.shape[2]
    used_L, fullest_L = np.zeros(num_layers, np.int64), np.zeros(num_layers, np.int64)
    for n in range(rows_NB.shape[0]):
        load_LG = np.zeros((num_layers, num_groups), np.int64)
        for row in rows_NB[n]:
            for layer in range(num_layers):
                for k in range(top_k):
                    load_LG[layer, ids_TLK[row, layer, k] // group_size] += 1
        for layer in range(num_layers):
            used_L[layer] += np.count_nonzero(load_LG[layer])
            fullest_L[layer] += load_LG[layer].max()
    return used_L, fullest_L
