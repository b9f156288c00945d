"""Statistics of traces: values one can check by hand, and laws that hold for any trace."""

from __future__ import annotations

from pathlib import Path

import moesim.traces as moesim_traces
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.files.traces import read_trace
from moesim.routing import statistics as stats
from moesim.routing.trace import RoutingTrace


def trace_of(ids_TLK, experts, requests=None, decode=None, predicted=None, tokens=None):
    ids = np.asarray(ids_TLK, dtype=np.uint8)
    request = np.asarray(requests if requests is not None else [0] * len(ids), dtype=np.int32)
    position = np.arange(len(ids)) - np.searchsorted(request, request)
    return RoutingTrace(
        name="t",
        model="t",
        origin="synthetic",
        num_experts=experts,
        expert_ids_TLK=ids,
        request_T=request,
        position_T=position.astype(np.int32),
        is_decode_T=np.asarray(decode if decode is not None else [False] * len(ids)),
        token_id_T=np.asarray(tokens if tokens is not None else [0] * len(ids), dtype=np.int32),
        layers=tuple(range(ids.shape[1])),
        predicted_HTLW=() if predicted is None else (np.asarray(predicted, dtype=np.uint8),),
    )


def random_trace(seed, tokens=60, layers=3, experts=8, top_k=2, requests=4, predicted=True):
    scores = np.random.default_rng(seed).random((2, tokens, layers, experts)).argsort(axis=3)[..., :top_k]
    owner = np.sort(np.random.default_rng(seed + 1).integers(0, requests, tokens))
    return trace_of(scores[0], experts, owner, predicted=scores[1][:, 1:] if predicted else None)


def test_load_and_skew():
    trace = trace_of([[[0, 1]], [[0, 2]], [[0, 1]]], experts=4)
    assert stats.expert_load_LE(trace).tolist() == [[3, 2, 1, 0]]
    assert stats.load_skew_L(trace) == pytest.approx([3 / 1.5])


def test_top1_repeat_stays_within_requests():
    trace = trace_of([[[0]], [[0]], [[1]], [[1]]], experts=2, requests=[0, 0, 0, 1])
    repeat, by_chance = stats.top1_repeat_L(trace)
    assert repeat == pytest.approx([1 / 2])
    assert by_chance == pytest.approx([1 / 2])


def test_set_overlap():
    trace = trace_of([[[0, 1]], [[1, 2]], [[2, 1]]], experts=4)
    overlap, by_chance = stats.set_overlap_L(trace)
    assert overlap == pytest.approx([(0.5 + 1.0) / 2])
    assert by_chance == pytest.approx([((1 / 3) ** 2 + 1 + (2 / 3) ** 2) / 2])


def test_token_affinity_counts_pairs_of_different_requests():
    trace = trace_of([[[0]], [[0]], [[1]], [[0]], [[1]]], 4, requests=[0, 0, 0, 1, 1], tokens=[7, 7, 8, 7, 7])
    affinity, by_chance = stats.token_affinity_L(trace)
    assert affinity == pytest.approx([2 / 4])  # token 7: {0, 0} of request 0 against {0, 1} of request 1
    assert by_chance == pytest.approx([3 / 6])


def test_information_of_a_copy_is_the_entropy():
    tokens = np.tile(np.arange(4), 200)
    real, shuffled = stats.layer_information(trace_of(np.stack([tokens, 3 - tokens], 1)[:, :, None], experts=4))
    assert real == pytest.approx([2.0])
    assert 0 <= shuffled[0] < 0.05


def test_prediction():
    trace = trace_of([[[0, 1], [2, 3]], [[0, 1], [0, 1]]], experts=4, predicted=[[[2, 0]], [[1, 0]]])
    recall, popular = stats.prediction_recall(trace)
    assert recall == pytest.approx([3 / 4])
    assert popular == pytest.approx([1 / 2])
    assert stats.prediction_top1_hit(trace) == pytest.approx([1 / 2])


def test_distinct_experts_counts_one_step_of_a_batch():
    ids = [[[0]], [[1]], [[2]], [[0]], [[3]], [[2]]]
    trace = trace_of(ids, experts=4, requests=[0, 0, 0, 1, 1, 1], decode=[False, True, True] * 2)
    distinct, even = stats.distinct_experts_L(trace, 2)
    assert distinct == pytest.approx([(2 + 1) / 2])  # steps: {1, 3}, then {2, 2}
    assert even == pytest.approx(4 * (1 - (3 / 4) ** 2))
    assert np.isnan(stats.distinct_experts_L(trace, 3)[0]).all()


def test_lru_by_hand():
    trace = trace_of([[[0]], [[1]], [[0]], [[2]], [[1]]], experts=4)
    assert stats.lru_hit_ratio_L(trace, 1) == pytest.approx([0])
    assert stats.lru_hit_ratio_L(trace, 2) == pytest.approx([1 / 5])  # 0 is hit; 1 was pushed out by 2
    assert stats.lru_hit_ratio_L(trace, 3) == pytest.approx([2 / 5])


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
        hits.append(hit / (trace.num_tokens * trace.top_k))
    return hits


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), capacity=st.integers(1, 8))
def test_lru_against_its_twin(seed, capacity):
    trace = random_trace(seed)
    assert stats.lru_hit_ratio_L(trace, capacity) == pytest.approx(lru_plainly(trace, capacity))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_laws(seed):
    trace = random_trace(seed)
    assert (stats.expert_load_LE(trace).sum(axis=1) == trace.num_tokens * trace.top_k).all()
    measures = stats.statistics(trace)
    for name, values in measures.items():
        assert len(values) in (trace.num_layers, trace.num_layers - 1), name
        if name.split("_by_")[0].endswith(("_rate", "_fraction")):
            known = values[~np.isnan(values)]
            assert ((known >= 0) & (known <= 1)).all(), name
    assert (measures["load_skew_ratio"] >= 1).all()
    assert (measures["load_skew_ratio"] <= trace.num_experts / trace.top_k).all()
    assert (measures["layer_information_bits"] <= np.log2(trace.num_experts)).all()


def test_relabelling_experts_changes_nothing():
    trace = random_trace(3)
    names = np.random.default_rng(0).permutation(trace.num_experts)
    renamed = trace_of(
        names[trace.expert_ids_TLK], trace.num_experts, trace.request_T, predicted=names[trace.predicted_HTLW[0]]
    )
    for (name, one), other in zip(stats.statistics(trace).items(), stats.statistics(renamed).values(), strict=True):
        assert one == pytest.approx(other, nan_ok=True), name


def test_independent_routing_is_near_its_chance_values():
    trace = random_trace(0, tokens=20_000, requests=3)
    measures = stats.statistics(trace)
    for name in ("top1_repeat_rate", "set_overlap_fraction", "layer_information_bits"):
        assert measures[name] == pytest.approx(measures[f"{name}_by_chance"], abs=0.02), name
    assert measures["prediction_recall_fraction"] == pytest.approx([0.25, 0.25], abs=0.02)


def test_without_predictions_and_one_layer():
    assert np.isnan(stats.statistics(random_trace(0, predicted=False))["prediction_recall_fraction"]).all()
    assert len(stats.statistics(random_trace(0, layers=1))["layer_information_bits"]) == 0


@pytest.mark.parametrize("wrong", [0, -1])
def test_sizes_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        stats.distinct_experts_L(random_trace(0), wrong)
    with pytest.raises(ValueError, match="at least 1"):
        stats.lru_hit_ratio_L(random_trace(0), wrong)


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
