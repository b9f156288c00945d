"""What a routing trace looks like in numbers: all measures of `load`, `locality`, `reuse`, `structure`, `topics` and
`prediction` by name.

Each measure stands beside the value it would have by chance, because a measure alone says little: a skewed router
repeats itself by chance. Decode and prefill count alike unless a docstring says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from moesim.routing.load import (
    Floats,
    batches,
    distinct_experts_L,
    expert_load_LE,
    load_skew_L,
    rank_imbalance_by_chance_L,
    rank_imbalance_L,
)  # fmt: skip
from moesim.routing.locality import set_overlap_L, token_affinity_L, top1_repeat_L
from moesim.routing.prediction import Recall, gate_recall, popularity_recall, table_recall
from moesim.routing.reuse import belady_hits_L, lru_hits_LC, miss_ratios
from moesim.routing.structure import coactivation_information_L, layer_information
from moesim.routing.topics import drift_over_requests, drift_within_requests, request_information, topics
from moesim.routing.trace import RoutingTrace

__all__ = [
    "BATCHES", "HORIZONS", "batches", "belady_hits_L", "cache_sizes", "distinct_experts_L", "expert_load_LE",
    "load_skew_L", "lru_hits_LC", "rank_imbalance_L", "statistics", "widths",
]  # fmt: skip

BATCHES = (1, 4, 16, 64)
HORIZONS = (1, 2, 3)
Named = Iterator[tuple[str, Floats]]


def widths(trace: RoutingTrace) -> tuple[int, ...]:
    """Widths at which predictions are judged: K, 1.5 K, 2 K and 3 K, as far as there are so many experts."""
    K = trace.top_k
    return tuple(sorted({min(width, trace.num_experts) for width in (K, math.ceil(1.5 * K), 2 * K, 3 * K)}))


def cache_sizes(trace: RoutingTrace) -> tuple[int, ...]:
    """Cache sizes that stand in the summary: a quarter and a half of the experts."""
    return tuple(sorted({max(1, trace.num_experts // share) for share in (4, 2)}))


def statistics(trace: RoutingTrace, *, ep: Sequence[int] = (), batches: Sequence[int] = BATCHES) -> dict[str, Floats]:
    """All measures by name: [L], [L - h] between layers h apart, or [1] for the trace as a whole.

    `..._by_chance` is the value beside it for independent choice, `..._by_popularity` that of guessing the most used
    experts; NaN stands where a trace has not what the measure needs. A measure between layers is of the next layer,
    and a prediction of width K, unless its name says `_horizon_H` and `_width_W`. Gate predictions are judged on all
    tokens, `table_...` on every second request (see `prediction.table_recall`).

    Args:
        ep: numbers of ranks to spread the experts over.
        batches: numbers of requests that decode together.

    Raises:
        ValueError: a number of ranks does not divide the experts, or a batch is not positive.
    """
    found: dict[str, Floats] = {}
    for named in (
        _load(trace, ep, batches),
        _locality(trace),
        _reuse(trace, batches),
        _structure(trace),
        _prediction(trace),
        _topics(trace),
    ):
        found.update(named)
    return found


def _load(trace: RoutingTrace, ep: Sequence[int], batches: Sequence[int]) -> Named:
    yield "load_skew_ratio", load_skew_L(trace)
    for size in ep:
        yield f"rank_imbalance_ratio_ep_{size}", rank_imbalance_L(trace, size)
    for size in ep:
        for batch in batches:
            name = f"rank_imbalance_ratio_ep_{size}_batch_{batch}"
            yield name, rank_imbalance_L(trace, size, batch)
            yield f"{name}_by_chance", rank_imbalance_by_chance_L(trace, size, batch)
    for batch in batches:
        distinct_L, even = distinct_experts_L(trace, batch)
        yield f"num_distinct_experts_batch_{batch}", distinct_L
        yield f"num_distinct_experts_batch_{batch}_by_chance", np.full(trace.num_layers, even)


def _locality(trace: RoutingTrace) -> Named:
    yield from _beside("top1_repeat_rate", top1_repeat_L(trace))
    yield from _beside("set_overlap_fraction", set_overlap_L(trace))
    yield from _beside("token_affinity_rate", token_affinity_L(trace))


def _reuse(trace: RoutingTrace, batches: Sequence[int]) -> Named:
    """Hit ratios of some sizes; by chance is LRU over shuffled tokens."""
    shuffled_TLK = np.random.default_rng(0).permutation(trace.expert_ids_TLK)
    by_chance_LC = lru_hits_LC(replace(trace, expert_ids_TLK=shuffled_TLK)) / (trace.num_tokens * trace.top_k)
    for batch in (None, *(batch for batch in batches if batch > 1)):
        lru_LC, belady_LC = miss_ratios(trace, batch)
        for size in cache_sizes(trace):
            name = f"hit_ratio_{size}_experts" + (f"_batch_{batch}" if batch else "")
            yield f"lru_{name}", 1 - lru_LC[:, size]
            if batch is None:
                yield f"lru_{name}_by_chance", by_chance_LC[:, size]
            yield f"belady_{name}", 1 - belady_LC[:, size]


def _structure(trace: RoutingTrace) -> Named:
    for horizon in _horizons(trace):
        yield from _beside(f"layer_information_bits{_suffix(trace, horizon)}", layer_information(trace, horizon))
    yield from _beside("coactivation_information_bits", coactivation_information_L(trace))


def _prediction(trace: RoutingTrace) -> Named:
    for horizon in _horizons(trace):
        gate, popular = gate_recall(trace, horizon), popularity_recall(trace, horizon)
        yield from _recalls(trace, "prediction", horizon, gate, popular)
    for horizon in _horizons(trace):
        table = table_recall(trace, horizon)
        yield from _recalls(trace, "table", horizon, *(table or (None, None)))


def _recalls(trace: RoutingTrace, name: str, horizon: int, guessed: Recall | None, popular: Recall | None) -> Named:
    unknown = Recall(
        np.full((max(trace.num_layers - horizon, 0), 0), np.nan), np.full(trace.num_layers - horizon, np.nan)
    )
    guessed, popular = guessed or unknown, popular or unknown
    for width in widths(trace):
        named = f"{name}_recall_fraction{_suffix(trace, horizon, width)}"
        yield named, guessed.at_width(width)
        yield f"{named}_by_popularity", popular.at_width(width)
    named = f"{name}_top1_hit_rate{_suffix(trace, horizon)}"
    yield named, guessed.top1_L
    yield f"{named}_by_popularity", popular.top1_L


def _topics(trace: RoutingTrace) -> Named:
    information_L, by_chance_L, share_L = request_information(trace)
    yield from _beside("request_information_bits", (information_L, by_chance_L))
    yield "request_explained_fraction", share_L
    found = topics(trace)
    yield "num_topics", np.array([float(found.num_topics)])
    silhouettes = found.silhouette_by_number, found.shuffled_by_number
    best, by_chance = (np.array([max(values.values(), default=np.nan)]) for values in silhouettes)
    yield from _beside("topic_silhouette", (best, by_chance))
    yield from _beside("drift_within_requests_bits", drift_within_requests(trace))
    yield from _beside("drift_over_requests_bits", drift_over_requests(trace))


def _beside(name: str, pair: tuple[Floats, Floats]) -> Named:
    yield name, pair[0]
    yield f"{name}_by_chance", pair[1]


def _horizons(trace: RoutingTrace) -> list[int]:
    """Horizon 1 always (of no layer pairs, where there is one layer), others where there are layers."""
    return [horizon for horizon in HORIZONS if horizon == 1 or horizon < trace.num_layers]


def _suffix(trace: RoutingTrace, horizon: int, width: int | None = None) -> str:
    """What a name says beyond the usual: the next layer, and width K."""
    wide = "" if width in (None, trace.top_k) else f"_width_{width}"
    return wide + ("" if horizon == 1 else f"_horizon_{horizon}")
