"""Hits of a cache at many sizes in one pass over a trace: no clock, no link, nothing that comes early.

What a layer needs is looked up at once; what is missing then takes slots, those with the most tokens first, and what
they need stays. These are the rules of `ExpertStore`, which a test holds this to. For caches whose worth does not
depend on what they hold (all but ARC), it is asked once for all sizes, and slots are filled by compiled code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.offload.routing import counted_LE, routing_of
from moesim.offload.store import ExpertStore
from moesim.policies.predictor import NoPredictor
from moesim.policies.view import Ids, View
from moesim.routing.trace import RoutingTrace


def hit_rates_C(
    trace: RoutingTrace, rows: Sequence[Ids], policy: Any, slots: Sequence[int], *, predictor: Any = None,
    history: Ids | None = None, seed: int = 0,
) -> NDArray[np.float64]:  # fmt: skip
    """Share of the experts needed that a cache holds, for each number of slots, [C].

    Args:
        rows: of the tokens of each step.
        policy: of `moesim.policies.cache.CACHES`. predictor: whose predictions it may use; none if None.
        slots: experts that fit on the device, over all layers.
        history: rows of requests that are known beforehand.
    """
    L, E = trace.num_layers, trace.num_experts
    loads = [counted_LE(trace.expert_ids_TLK[row], E) for row in rows]
    predictor = predictor or NoPredictor()
    needs_future = policy.needs_future or predictor.needs_future
    future_SLE = np.stack(loads).astype(np.int32) if needs_future else None
    known_LE = counted_LE(trace.expert_ids_TLK[history], E) if history is not None else None
    by_size = policy.follows_slots
    found = []
    for group in [[c] for c in slots] if by_size else [list(slots)]:
        views = [View(L, E, trace.top_k) for _ in group]
        stores = [ExpertStore(view, c, policy, future_SLE, known_LE) for view, c in zip(views, group, strict=True)]
        started = predictor.start(views[0], future_SLE, np.random.default_rng(seed))
        found.append(_pass(trace, rows, loads, stores, started))
    return np.concatenate(found)


def _pass(
    trace: RoutingTrace, rows: Sequence[Ids], loads: Sequence[NDArray[np.int64]], stores: Sequence[ExpertStore],
    predictor: Any,
) -> NDArray[np.float64]:  # fmt: skip
    """The cache of the first store says what everything is worth; slots are those of each."""
    view, cache, L, E = stores[0].view, stores[0].cache, trace.num_layers, trace.num_experts
    held_CP = np.stack([store.view.held_P for store in stores])
    is_shared = stores[0].is_shared
    free_CL = np.stack([np.repeat(s.free, L) if is_shared else s.free_L for s in stores]).astype(np.int64)
    hits_C, needed = np.zeros(len(stores), np.int64), 0
    places_P = np.arange(L * E)
    gone_P = np.zeros(L * E, np.int64)  # 1, 2, ... in the order of leaving
    follows = len(stores) == 1
    for row, load_LE in zip(rows, loads, strict=True):
        routing = routing_of(trace, row, load_LE, int(trace.request_T[row[0]]))
        routing.begin(view)
        predictor.begin(view)
        for layer in range(L):
            routing.show(view, layer)
            predictor.look(view)
            cache.used(view)
            own = slice(0, L * E) if is_shared else slice(layer * E, (layer + 1) * E)
            if follows:
                view.held_P = held_CP[0]
            worth = cache.worth(places_P[own], view)
            gone_P[own] = 0
            free_C = free_CL[:, 0] if is_shared else free_CL[:, layer]
            _fill(held_CP[:, own], free_C, worth, layer * E + view.ids - own.start, hits_C, gone_P[own])
            if follows:
                (gone,) = gone_P[own].nonzero()
                for place in gone[np.argsort(gone_P[own][gone])]:
                    cache.left(int(own.start + place))
            needed += len(view.ids)
            view.mark_used()
    return hits_C / max(needed, 1)


@njit(cache=True)
def _fill(held_CP, free_C, worth_P, needed_N, hits_C, gone_P):  # type: ignore[no-untyped-def]
    """Look the needed up in every cache, and let what is missing take slots."""
    for c in range(len(free_C)):
        held_P = held_CP[c]
        missing = num_gone = 0
        for n in needed_N:
            if held_P[n]:
                hits_C[c] += 1
            else:
                missing += 1
        lacking = missing - free_C[c]
        while lacking > 0:
            least, where = np.inf, -1
            for p in range(len(worth_P)):
                if held_P[p] and worth_P[p] < least:
                    is_needed = False
                    for n in needed_N:
                        if n == p:
                            is_needed = True
                    if not is_needed:
                        least, where = worth_P[p], p
            if where < 0:
                break
            held_P[where] = False
            num_gone += 1
            gone_P[where] = num_gone
            free_C[c] += 1
            lacking -= 1
        for n in needed_N:
            if not held_P[n] and free_C[c] > 0:
                held_P[n] = True
                free_C[c] -= 1
