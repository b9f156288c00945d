"""Reuse: hits of an expert cache at every size in one pass, for LRU and for Belady's MIN.

**What is asked at once.** A step asks for its distinct experts together, each once: all are looked up before any
counts as used. A step is one token, requests in turn; or, with a batch, one token of each of `batch` requests that
decode side by side (`decode_in_step`). After a step, a cache of c experts holds what the step asked for, or c of them
where the step asks for more than c, and keeps others from before in the rest of its room. LRU keeps those used last
(within a step in the order of its tokens, the lighter expert of a token last). MIN knows the future and keeps those
asked for again first, which makes it the floor of misses under these rules: no other choice hits more.

**One pass.** Both are *stack algorithms*: a step leaves in c + 1 places what it leaves in c, and one expert more. The
experts therefore stand in one list, the first c of which are the cache of size c, and the place of an asked expert says
from which size on it is a hit. Source: Mattson, Gecsei, Slutz, Traiger, IBM Systems Journal 9(2), 1970; MIN: Belady,
IBM Systems Journal 5(2), 1966. Expert caches as LRU: Mixtral-offloading (arXiv 2312.17238), figure 2.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.routing.load import Floats, Ints, decode_rows
from moesim.routing.trace import RoutingTrace


def lru_hits_LC(trace: RoutingTrace, batch: int | None = None) -> Ints:
    """Hits of an LRU cache of c = 0 ... E experts in each layer, int64 [L, E + 1]; of `expert_uses_L` uses.

    batch: None for all tokens, requests in turn; else that many requests decode side by side (all 0 where too few do).

    Raises:
        ValueError: `batch` is not positive.
    """
    return _hits_LC(trace, batch, knows_future=False)


def belady_hits_LC(trace: RoutingTrace, batch: int | None = None) -> Ints:
    """As `lru_hits_LC`, for Belady's MIN: the most hits that any cache can have."""
    return _hits_LC(trace, batch, knows_future=True)


def belady_hits_L(trace: RoutingTrace, capacity: int) -> Ints:
    """Hits of Belady's MIN with room for `capacity` experts in each layer, requests in turn, int64 [L].

    Raises:
        ValueError: `capacity` is negative.
    """
    if capacity < 0:
        raise ValueError(f"a cache has room for 0 experts or more; given {capacity}")
    return belady_hits_LC(trace)[:, min(capacity, trace.num_experts)]


def miss_ratios(trace: RoutingTrace, batch: int | None = None) -> tuple[Floats, Floats]:
    """Miss-ratio curves of LRU and of MIN: misses over uses with room for c = 0 ... E experts, [L, E + 1] both.

    NaN where there is no step. `batch` as in `lru_hits_LC`.
    """
    uses_L1 = expert_uses_L(trace, batch)[:, None].astype(np.float64)
    uses_L1[uses_L1 == 0] = np.nan
    return 1 - lru_hits_LC(trace, batch) / uses_L1, 1 - belady_hits_LC(trace, batch) / uses_L1


def expert_uses_L(trace: RoutingTrace, batch: int | None = None) -> Ints:
    """Uses that a cache is asked for, int64 [L]: T x K, or the sum over batched steps of their distinct experts."""
    if batch is None:
        return np.full(trace.num_layers, trace.num_tokens * trace.top_k)
    return np.asarray(_distinct_L(_steps_LNA(trace, batch), trace.num_experts))


def decode_in_step(trace: RoutingTrace, batch: int) -> Ints:
    """Rows of the tokens of consecutive steps of `batch` places, int64 [N, batch].

    As continuous batching would: a place decodes its request to the end and then takes the next request in order; it
    ends with the first place that finds none. Unlike in `load.batches`, a column is whole requests, one after the
    other, so that a step can be compared with the step before. Decode tokens, or all where there are none.

    Raises:
        ValueError: `batch` is not positive.
    """
    if batch < 1:
        raise ValueError(f"a batch needs at least 1 request; given {batch}")
    rows = decode_rows(trace)
    starts = np.flatnonzero(np.diff(trace.request_T[rows], prepend=-1))
    places: list[list[Ints]] = [[] for _ in range(batch)]
    filled = np.zeros(batch, dtype=np.int64)
    for request in np.split(rows, starts[1:]):
        first = int(filled.argmin())
        places[first].append(request)
        filled[first] += len(request)
    num_steps = int(filled.min())
    if not num_steps:
        return np.zeros((0, batch), dtype=np.int64)
    return np.stack([np.concatenate(place)[:num_steps] for place in places], axis=1)


def _steps_LNA(trace: RoutingTrace, batch: int | None) -> NDArray[np.unsignedinteger]:
    """Experts that each step mentions, in the order of its tokens, [L, N, A]."""
    ids_TLK = trace.expert_ids_TLK
    if batch is None:
        return np.ascontiguousarray(ids_TLK.swapaxes(0, 1))
    rows_NB = decode_in_step(trace, batch)
    steps_LNBK = ids_TLK[rows_NB].transpose(2, 0, 1, 3)
    return np.ascontiguousarray(steps_LNBK).reshape(trace.num_layers, len(rows_NB), batch * trace.top_k)


def _hits_LC(trace: RoutingTrace, batch: int | None, knows_future: bool) -> Ints:
    steps_LNA = _steps_LNA(trace, batch)
    by_depth_LD = np.stack([_hits_by_depth(steps_NA, trace.num_experts, knows_future) for steps_NA in steps_LNA])
    return np.concatenate([np.zeros_like(by_depth_LD[:, :1]), by_depth_LD.cumsum(axis=1)], axis=1)


@njit(cache=True)
def _next_mention_NA(steps_NA, num_experts):  # type: ignore[no-untyped-def]
    """The next step that mentions the same expert, N where none does."""
    num_steps, num_asked = steps_NA.shape
    next_NA = np.empty((num_steps, num_asked), np.int64)
    next_E = np.full(num_experts, num_steps, np.int64)
    for n in range(num_steps - 1, -1, -1):
        for a in range(num_asked):
            next_NA[n, a] = next_E[steps_NA[n, a]]
        for a in range(num_asked):
            next_E[steps_NA[n, a]] = n
    return next_NA


@njit(cache=True)
def _hits_by_depth(steps_NA, num_experts, knows_future):  # type: ignore[no-untyped-def]
    """Uses found at each place of the list, [E]; the worth of an expert decides its place in the new list.

    Place c of the new list goes to the worthiest of the step's experts and of the first c of the old list that has no
    place yet. What the step asked for is worth more than all else.
    """
    num_steps, num_asked = steps_NA.shape
    next_NA = _next_mention_NA(steps_NA, num_experts) if knows_future else np.empty((0, 0), np.int64)
    hits_D = np.zeros(num_experts, np.int64)
    list_D = np.empty(num_experts, np.int64)
    worth_E = np.zeros(num_experts, np.int64)
    asked_E = np.full(num_experts, -1, np.int64)  # the last step that asked for it
    waiting_E = np.empty(num_experts, np.int64)
    size = 0
    for n in range(num_steps):
        num_waiting = 0
        for a in range(num_asked):
            expert = steps_NA[n, a]
            if asked_E[expert] != n:
                waiting_E[num_waiting] = expert
                num_waiting += 1
            asked_E[expert] = n
            worth_E[expert] = -next_NA[n, a] if knows_future else n * num_asked + a
        place, old_size, num_distinct = 0, size, num_waiting
        while num_waiting:
            if place < old_size:
                old = list_D[place]
                if asked_E[old] == n:
                    hits_D[place] += 1
                else:
                    waiting_E[num_waiting] = old
                    num_waiting += 1
            best = 0
            for w in range(1, num_waiting):
                one, other = waiting_E[w], waiting_E[best]
                if place < num_distinct and (asked_E[one] == n) != (asked_E[other] == n):
                    if asked_E[one] == n:
                        best = w
                elif worth_E[one] > worth_E[other]:
                    best = w
            list_D[place] = waiting_E[best]
            num_waiting -= 1
            waiting_E[best] = waiting_E[num_waiting]
            place += 1
        size = max(old_size, place)
    return hits_D


@njit(cache=True)
def _distinct_L(steps_LNA, num_experts):  # type: ignore[no-untyped-def]
    """Sum over steps of the distinct experts of each, [L]."""
    num_layers, num_steps, num_asked = steps_LNA.shape
    distinct_L = np.zeros(num_layers, np.int64)
    for layer in range(num_layers):
        asked_E = np.full(num_experts, -1, np.int64)
        for n in range(num_steps):
            for a in range(num_asked):
                distinct_L[layer] += asked_E[steps_LNA[layer, n, a]] != n
                asked_E[steps_LNA[layer, n, a]] = n
    return distinct_L
