"""Statistics of traces: values one can check by hand, and laws that hold for any trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import moesim.traces as moesim_traces
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import esft, gpt_oss, random_trace, trace_of

from moesim.files.traces import read_trace
from moesim.routing import load, locality, reuse
from moesim.routing import statistics as stats
from moesim.routing.topics import topics


def test_load_and_skew():
    trace = trace_of([[[0, 1]], [[0, 2]], [[0, 1]]], experts=4)
    assert stats.expert_load_LE(trace).tolist() == [[3, 2, 1, 0]]
    assert stats.load_skew_L(trace) == pytest.approx([3 / 1.5])


def test_top1_repeat_stays_within_requests():
    trace = trace_of([[[0]], [[0]], [[1]], [[1]]], experts=2, requests=[0, 0, 0, 1])
    repeat, by_chance = locality.top1_repeat_L(trace)
    assert repeat == pytest.approx([1 / 2])
    assert by_chance == pytest.approx([1 / 2])


def test_set_overlap():
    trace = trace_of([[[0, 1]], [[1, 2]], [[2, 1]]], experts=4)
    overlap, by_chance = locality.set_overlap_L(trace)
    assert overlap == pytest.approx([(0.5 + 1.0) / 2])
    assert by_chance == pytest.approx([((1 / 3) ** 2 + 1 + (2 / 3) ** 2) / 2])


def test_token_affinity_counts_pairs_of_different_requests():
    trace = trace_of([[[0]], [[0]], [[1]], [[0]], [[1]]], 4, requests=[0, 0, 0, 1, 1], tokens=[7, 7, 8, 7, 7])
    affinity, by_chance = locality.token_affinity_L(trace)
    assert affinity == pytest.approx([2 / 4])  # token 7: {0, 0} of request 0 against {0, 1} of request 1
    assert by_chance == pytest.approx([3 / 6])


def test_distinct_experts_counts_one_step_of_a_batch():
    ids = [[[0]], [[1]], [[2]], [[0]], [[3]], [[2]]]
    trace = trace_of(ids, experts=4, requests=[0, 0, 0, 1, 1, 1], decode=[False, True, True] * 2)
    distinct, even = stats.distinct_experts_L(trace, 2)
    assert distinct == pytest.approx([(2 + 1) / 2])  # steps: {1, 3}, then {2, 2}
    assert even == pytest.approx(4 * (1 - (3 / 4) ** 2))
    assert np.isnan(stats.distinct_experts_L(trace, 3)[0]).all()


def test_batches_hold_one_token_of_each_request_at_one_step():
    trace = random_trace(1, tokens=90, requests=7)
    rows = stats.batches(trace, 3)
    place_T = np.arange(trace.num_tokens) - np.searchsorted(trace.request_T, trace.request_T)
    assert (place_T[rows] == place_T[rows[:, :1]]).all()
    assert all(len(set(requests)) == 3 for requests in trace.request_T[rows])
    assert len(set(rows.ravel())) == rows.size
    running_S = np.bincount(place_T)
    assert len(rows) == (running_S // 3).sum()
    assert len(stats.batches(trace, 8)) == 0


def test_rank_imbalance_by_hand():
    ids = [[[0, 1]], [[0, 2]], [[3, 0]], [[1, 0]]]
    trace = trace_of(ids, experts=4, requests=[0, 0, 1, 1])
    assert stats.rank_imbalance_L(trace, 2) == pytest.approx([6 / 4])  # experts 0, 1: 4 + 2 uses; 2, 3: 1 + 1
    # step 0: {0 1}, {3 0}: 3 against 1; step 1: {0 2}, {1 0}: 3 against 1
    assert stats.rank_imbalance_L(trace, 2, batch=2) == pytest.approx([3 / 2])
    assert stats.rank_imbalance_L(trace, 4, batch=1) == pytest.approx([2.0])
    assert np.isnan(stats.rank_imbalance_L(trace, 2, batch=3)).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 4))
def test_laws_of_rank_imbalance(seed, batch):
    trace = random_trace(seed)
    E = trace.num_experts
    assert stats.rank_imbalance_L(trace, 1) == pytest.approx(np.ones(3))
    assert stats.rank_imbalance_L(trace, 1, batch) == pytest.approx(np.ones(3), nan_ok=True)
    assert stats.rank_imbalance_L(trace, E) == pytest.approx(stats.load_skew_L(trace))
    fewer, more = (stats.rank_imbalance_L(trace, ep, batch) for ep in (2, 4))
    assert ((more >= fewer) | np.isnan(fewer)).all()
    assert ((more <= 4) | np.isnan(more)).all()


@pytest.mark.parametrize("ep", [0, 3, 16])
def test_ranks_that_do_not_divide_the_experts(ep):
    with pytest.raises(ValueError, match=f"ep {ep}: .*must divide the 8 experts of trace 't'; one of 1, 2, 4, 8"):
        stats.rank_imbalance_L(random_trace(0), ep)


def test_tokens_without_ids_have_no_affinity():
    affinity, any_two = locality.token_affinity_L(replace(random_trace(0), token_id_T=None))
    assert np.isnan(affinity).all() and np.isfinite(any_two).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), layers=st.integers(1, 4), top_k=st.integers(1, 3), requests=st.integers(1, 5))
def test_laws(seed, layers, top_k, requests):
    trace = random_trace(seed, layers=layers, top_k=top_k, requests=requests)
    assert (stats.expert_load_LE(trace).sum(axis=1) == trace.num_tokens * trace.top_k).all()
    measures = stats.statistics(trace, ep=(2, 4), batches=(1, 2, 4))
    for name, values in measures.items():
        assert len(values) in (1, *range(max(0, layers - 3), layers + 1)), name
        known = values[~np.isnan(values)]
        if "_rate" in name or "_fraction" in name or "_hit_ratio_" in name:
            assert ((known >= 0) & (known <= 1)).all(), name
        if "_bits" in name:
            assert (known >= -1e-9).all(), name
        if name.startswith("drift"):
            assert (known <= 1 + 1e-9).all(), name
    assert (measures["load_skew_ratio"] >= 1).all()
    assert (measures["load_skew_ratio"] <= trace.num_experts / trace.top_k).all()
    assert (measures["layer_information_bits"] <= np.log2(trace.num_experts)).all()


def test_relabelling_experts_changes_nothing():
    """Only guesses break ties by number: those of equal popularity are left out, those of a table differ by little."""
    trace = random_trace(3, tokens=400)
    names = np.random.default_rng(0).permutation(trace.num_experts)
    renamed = trace_of(
        names[trace.expert_ids_TLK], trace.num_experts, trace.request_T, predicted=names[trace.predicted_HTLW[0]]
    )
    for (name, one), other in zip(stats.statistics(trace).items(), stats.statistics(renamed).values(), strict=True):
        if "popularity" not in name:
            assert one == pytest.approx(other, abs=0.02 if "table" in name else 1e-9, nan_ok=True), name


def test_independent_routing_is_near_its_chance_values():
    """Every measure of structure must find none here."""
    trace = random_trace(0, tokens=20_000, requests=40)
    measures = stats.statistics(trace, ep=(4,), batches=(4, 16))
    compared = [name for name in measures if f"{name}_by_chance" in measures or f"{name}_by_popularity" in measures]
    assert len(compared) > 20
    for name in compared:
        beside = measures.get(f"{name}_by_chance", measures.get(f"{name}_by_popularity"))
        if np.isfinite(measures[name]).all():
            assert measures[name] == pytest.approx(beside, abs=0.02, rel=0.02), name
    assert measures["request_explained_fraction"] == pytest.approx(np.zeros(3), abs=0.001)
    assert measures["prediction_recall_fraction"] == pytest.approx([0.25, 0.25], abs=0.02)


def test_without_predictions_and_one_layer():
    assert np.isnan(stats.statistics(random_trace(0, predicted=False))["prediction_recall_fraction"]).all()
    assert len(stats.statistics(random_trace(0, layers=1))["layer_information_bits"]) == 0


@pytest.mark.parametrize("wrong", [0, -1])
def test_sizes_that_make_no_sense(wrong):
    for measure in (stats.distinct_experts_L, stats.batches, load.shuffled_batches, reuse.lru_hits_LC):
        with pytest.raises(ValueError, match="at least 1"):
            measure(random_trace(0), wrong)


def test_gpt_oss_against_what_was_published_with_it():
    """The capture's notes give these figures for 222 samples; the file holds 178 of them.

    The 44 that lack are samples 4 to 47, whole data sets, not a draw of all: the rest is more skewed (dropping data
    sets of the rest in turn moves the skew from 2.65 to 2.75), repeats more, and touches fewer experts. The published
    batches mix tokens at random.
    """
    trace = gpt_oss()
    assert trace.num_tokens == 60337 and len(np.unique(trace.request_T)) == 178
    assert stats.load_skew_L(trace).mean() == pytest.approx(2.49, abs=0.25)
    assert locality.set_overlap_L(trace)[0].mean() == pytest.approx(0.411, abs=0.02)
    for batch, published in {1: 4.0, 4: 12.3, 8: 18.4, 16: 23.7, 32: 27.1, 64: 29.0}.items():
        rows = load.shuffled_batches(trace, batch)
        ids = trace.expert_ids_TLK[rows]
        distinct = np.mean([[len(np.unique(layer)) for layer in step.swapaxes(0, 1)] for step in ids[:150]])
        assert distinct == pytest.approx(published, rel=0.04), batch
        assert stats.distinct_experts_L(trace, batch)[0].mean() <= distinct + 0.1, "tokens of one step agree more"
    for batch, published in {16: 1.62, 64: 1.43}.items():
        assert load.rank_imbalance_by_chance_L(trace, 8, batch).mean() == pytest.approx(published, abs=0.1)


def test_three_tasks_are_three_topics():
    found = topics(esft())
    assert found.num_topics == 3
    assert found.topic_N.tolist() == [0] * 127 + [2] * 13 + [1] * 40


def test_the_shipped_trace_is_balanced_and_far_from_chance():
    """What traces/README.md promises: OLMoE's shape, a trained router, structure over tokens and over layers."""
    trace = read_trace(Path(moesim_traces.__path__[0]) / "olmoe-shape-16x64.parquet")
    assert (trace.num_layers, trace.num_experts, trace.top_k, trace.origin) == (16, 64, 8, "trained")
    assert trace.weights_TLK is not None and trace.is_decode_T.any() and not trace.is_decode_T.all()
    measures = {name: values.mean() for name, values in stats.statistics(trace).items()}
    assert measures["load_skew_ratio"] < 2
    assert measures["token_affinity_rate"] > 5 * measures["token_affinity_rate_by_chance"]
    assert measures["top1_repeat_rate"] > 2 * measures["top1_repeat_rate_by_chance"]
    assert measures["layer_information_bits"] > 5 * measures["layer_information_bits_by_chance"]
    assert measures["prediction_recall_fraction"] > 3 * measures["prediction_recall_fraction_by_popularity"]
