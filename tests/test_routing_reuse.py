"""Expert caches at every size in one pass, against lists in order of use and against all possible choices."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import esft, random_trace, trace_of

from moesim.routing.reuse import (
    belady_hits_L,
    belady_hits_LC,
    decode_in_step,
    expert_uses_L,
    lru_hits_LC,
    miss_ratios,
)


def test_lru_by_hand():
    trace = trace_of([[[0]], [[1]], [[0]], [[2]], [[1]]], experts=4)
    assert lru_hits_LC(trace).tolist() == [[0, 0, 1, 2, 2]]  # with room for 2, 2 pushes 1 out


def test_belady_by_hand():
    trace = trace_of([[[0]], [[1]], [[2]], [[0]], [[1]], [[2]]], experts=4)
    assert lru_hits_LC(trace).tolist() == [[0, 0, 0, 3, 3]]
    assert belady_hits_LC(trace).tolist() == [[0, 0, 2, 3, 3]]  # 0 is kept over 1, then any over 0


def lru_plainly(trace, capacity):
    """The twin: a list in order of use, one layer at a time."""
    hits = []
    for layer in range(trace.num_layers):
        recent: list[int] = []
        hit = 0
        for ids in trace.expert_ids_TLK[:, layer].tolist():
            hit += sum(expert in recent[:capacity] for expert in ids)
            for expert in ids:
                recent = [expert, *(other for other in recent if other != expert)]
        hits.append(hit)
    return hits


def asked(trace, batch):
    """Experts of each step, in order of mention, of layer 0."""
    rows = np.arange(trace.num_tokens)[:, None] if batch is None else decode_in_step(trace, batch)
    return [trace.expert_ids_TLK[step, 0].ravel().tolist() for step in rows]


def lru_batched_plainly(steps, capacity):
    """The same twin, for steps that mention an expert more than once and ask for it once."""
    recent: list[int] = []
    hits = 0
    for step in steps:
        hits += sum(expert in recent[:capacity] for expert in set(step))
        for expert in step:
            recent = [expert, *(other for other in recent if other != expert)]
    return hits


def best_possible(steps, capacity):
    """The most hits over all ways to fill the cache: what a step asked for stays, or `capacity` of it."""
    best = {frozenset(): 0}
    for step in map(set, steps):
        after: dict[frozenset[int], int] = {}
        for cache, hits in best.items():
            if len(step) >= capacity:
                nexts = [frozenset(kept) for kept in combinations(sorted(step), capacity)]
            else:
                old, room = sorted(cache - step), capacity - len(step)
                nexts = [frozenset(step | set(kept)) for kept in combinations(old, min(room, len(old)))]
            for kept in nexts:
                after[kept] = max(after.get(kept, 0), hits + len(step & cache))
        best = after
    return max(best.values())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), top_k=st.integers(1, 4))
def test_lru_against_its_twin(seed, top_k):
    trace = random_trace(seed, top_k=top_k)
    hits_LC = lru_hits_LC(trace)
    for capacity in range(trace.num_experts + 1):
        assert hits_LC[:, capacity].tolist() == lru_plainly(trace, capacity), capacity


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(1, 3),
    batch=st.sampled_from([None, 1, 2, 3]),
    experts=st.integers(3, 6),
)
def test_belady_is_the_best_possible(seed, top_k, batch, experts):
    trace = random_trace(seed, tokens=14, layers=1, experts=experts, top_k=top_k, requests=4)
    steps = asked(trace, batch)
    for capacity in range(experts + 1):
        assert belady_hits_LC(trace, batch)[0, capacity] == best_possible(steps, capacity), capacity
        assert lru_hits_LC(trace, batch)[0, capacity] == lru_batched_plainly(steps, capacity), capacity


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), top_k=st.integers(1, 4), batch=st.sampled_from([None, 1, 2, 4]))
def test_laws(seed, top_k, batch):
    """More room never hurts; the future never hurts; with room for all, only first uses miss."""
    trace = random_trace(seed, top_k=top_k)
    lru_LC, belady_LC, uses_L = lru_hits_LC(trace, batch), belady_hits_LC(trace, batch), expert_uses_L(trace, batch)
    assert (lru_LC[:, 0] == 0).all() and (belady_LC[:, 0] == 0).all()
    assert (np.diff(lru_LC) >= 0).all() and (np.diff(belady_LC) >= 0).all()
    assert (lru_LC <= belady_LC).all()
    rows = np.arange(trace.num_tokens) if batch is None else decode_in_step(trace, batch)
    seen_L = [len(np.unique(trace.expert_ids_TLK[rows][..., layer, :])) for layer in range(trace.num_layers)]
    assert (uses_L - lru_LC[:, -1]).tolist() == seen_L
    assert (belady_LC[:, -1] == lru_LC[:, -1]).all()
    if batch is None:
        assert (lru_LC[:, top_k] == belady_LC[:, top_k]).all(), "with room for K there is nothing to choose"
        assert (belady_hits_L(trace, 3) == belady_LC[:, 3]).all()
        assert (belady_hits_L(trace, 99) == belady_LC[:, -1]).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 6))
def test_places_decode_whole_requests_one_after_the_other(seed, batch):
    trace = random_trace(seed, requests=5)
    rows = decode_in_step(trace, batch)
    assert len(set(rows.ravel())) == rows.size
    requests = len(np.unique(trace.request_T))
    assert (len(rows) > 0) == (batch <= requests)
    for column in rows.T:
        goes_on = np.diff(trace.request_T[column]) == 0
        assert (np.diff(column)[goes_on] == 1).all()
        assert (np.diff(trace.request_T[column]) >= 0).all()
    if batch == 1:
        assert rows[:, 0].tolist() == list(range(trace.num_tokens))
        assert (lru_hits_LC(trace, 1) == lru_hits_LC(trace)).all()


def test_only_decode_tokens_run_in_batches():
    trace = trace_of([[[0]], [[1]], [[2]], [[3]]], 4, requests=[0, 0, 1, 1], decode=[False, True] * 2)
    assert decode_in_step(trace, 2).tolist() == [[1, 3]]


def test_too_few_requests_for_a_batch():
    trace = random_trace(0, requests=2)
    assert expert_uses_L(trace, 3).tolist() == [0, 0, 0]
    assert all(np.isnan(curve).all() for curve in miss_ratios(trace, 3))


def test_a_negative_cache():
    with pytest.raises(ValueError, match="0 experts or more; given -1"):
        belady_hits_L(random_trace(0), -1)


def test_a_real_trace():
    """DeepSeek-V2-Lite's shape (ESFT): the floor is far below LRU, and shuffling its tokens takes hits away."""
    trace = esft()
    lru_LC, belady_LC = miss_ratios(trace)
    assert (lru_LC >= belady_LC).all()
    assert lru_LC[:, 16].mean() == pytest.approx(0.462, abs=0.001)
    assert belady_LC[:, 16].mean() == pytest.approx(0.291, abs=0.001)
    one_layer = replace(trace, expert_ids_TLK=np.ascontiguousarray(trace.expert_ids_TLK[:3000, 5:6]))
    assert lru_hits_LC(one_layer)[0, 16] == lru_plainly(one_layer, 16)[0]
    shuffled = replace(trace, expert_ids_TLK=np.random.default_rng(0).permutation(trace.expert_ids_TLK))
    assert (miss_ratios(shuffled)[0][:, 16] > lru_LC[:, 16]).all()
