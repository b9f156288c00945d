"""Structure inside tokens and requests: planted where one knows it, and absent where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import random_trace, trace_of

from moesim.routing import prediction, structure, topics


def test_information_of_a_copy_is_the_entropy():
    tokens = np.tile(np.arange(4), 200)
    real, shuffled = structure.layer_information(trace_of(np.stack([tokens, 3 - tokens], 1)[:, :, None], experts=4))
    assert real == pytest.approx([2.0])
    assert 0 <= shuffled[0] < 0.05


def test_horizons_look_so_many_layers_ahead():
    """Layer 2 copies layer 0; layer 1 knows nothing of either."""
    random = np.random.default_rng(0)
    first, other = random.integers(0, 4, (2, 4000))
    trace = trace_of(np.stack([first, other, first], 1)[:, :, None], experts=4)
    assert structure.layer_information(trace)[0] == pytest.approx([0, 0], abs=0.01)
    assert structure.layer_information(trace, 2)[0] == pytest.approx([2], abs=0.01)
    assert len(structure.layer_information(trace, 3)[0]) == 0
    matrix_EE = structure.transitions_LEE(trace, 2)[0]
    assert (matrix_EE == np.diag(np.bincount(first))).all()
    with pytest.raises(ValueError, match="at least 1 layer; given 0"):
        structure.layer_information(trace, 0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), top_k=st.integers(1, 4))
def test_laws_of_transitions_and_pairs(seed, top_k):
    trace = random_trace(seed, top_k=top_k)
    load_LE = np.stack([np.bincount(ids.ravel(), minlength=8) for ids in trace.expert_ids_TLK.swapaxes(0, 1)])
    pairs_LEE = structure.coactivation_LEE(trace)
    assert (np.diagonal(pairs_LEE, axis1=1, axis2=2) == load_LE).all()
    assert (pairs_LEE == pairs_LEE.swapaxes(1, 2)).all()
    assert (pairs_LEE.sum(axis=2) == top_k * load_LE).all(), "each choice of an expert has K - 1 partners"
    assert structure.transitions_LEE(trace).sum(axis=(1, 2)).tolist() == [trace.num_tokens] * 2


def test_pairs_that_always_go_together():
    """Experts 2i and 2i + 1 of 8 are always chosen together: one tells which of 7 the other is.

    Dealt anew, it still tells that the other is one of 4, since the first is always even.
    """
    first = 2 * np.random.default_rng(0).permutation(np.repeat(np.arange(4), 500))
    trace = trace_of(np.stack([first, first + 1], 1)[:, None, :], experts=8)
    information, dealt = structure.coactivation_information_L(trace)
    assert information == pytest.approx([np.log2(7)])
    assert dealt == pytest.approx([np.log2(7 / 4)], abs=0.01)
    lift_EE = structure.coactivation_lift_LEE(trace)[0]
    assert lift_EE[0, 1] == pytest.approx(7) and lift_EE[0, 2] == 0 and np.isnan(lift_EE[0, 0])


def test_skewed_but_independent_pairs_have_no_lift():
    """Pairs drawn as u_a u_b: what a plain p_a p_b would call structure, since no expert pairs with itself."""
    u_E = np.array([8.0, 4, 2, 1, 1])
    share_EE = np.outer(u_E, u_E)
    np.fill_diagonal(share_EE, 0)
    drawn = np.random.default_rng(0).choice(25, 200_000, p=(share_EE / share_EE.sum()).ravel())
    trace = trace_of(np.stack(np.divmod(drawn, 5), 1)[:, None, :], experts=5)
    assert structure.coactivation_information_L(trace)[0] == pytest.approx([0], abs=2e-4)
    lift_EE = structure.coactivation_lift_LEE(trace)[0]
    assert lift_EE[~np.eye(5, dtype=bool)] == pytest.approx(np.ones(20), abs=0.06)


def test_one_expert_per_token_has_no_pairs():
    assert np.isnan(structure.coactivation_information_L(random_trace(0, top_k=1))).all()


def test_prediction_by_hand():
    trace = trace_of([[[0, 1], [2, 3]], [[0, 1], [0, 1]]], experts=4, predicted=[[[2, 0]], [[1, 0]]])
    gate, popular = prediction.gate_recall(trace), prediction.popularity_recall(trace)
    assert gate.recall_LW.tolist() == [[2 / 4, 3 / 4]]
    assert popular.at_width(2) == pytest.approx([1 / 2]) and popular.at_width(4) == pytest.approx([1])
    assert gate.top1_L == pytest.approx([1 / 2])
    assert np.isnan(gate.at_width(3)).all()
    assert prediction.gate_recall(trace, 2) is None


def test_a_table_learns_a_rule_and_nothing_from_noise():
    """Layer 1 is layer 0 plus 1, layer 2 is noise; judged on requests that it has not seen."""
    random = np.random.default_rng(0)
    first = random.random((4000, 8)).argsort(axis=1)[:, :2]
    noise = random.random((4000, 8)).argsort(axis=1)[:, :2]
    trace = trace_of(np.stack([first, (first + 1) % 8, noise], 1), 8, requests=np.arange(4000) // 100)
    table, popular = prediction.table_recall(trace)
    assert table.at_width(2) == pytest.approx([1, 0.25], abs=0.03)
    assert table.at_width(8) == pytest.approx([1, 1])
    assert table.top1_L[0] == pytest.approx(0.5, abs=0.05)  # it knows the two, not which is first
    assert popular.at_width(2) == pytest.approx([0.25, 0.25], abs=0.03)
    assert (np.diff(table.recall_LW) >= 0).all()


def test_a_table_is_judged_on_requests_it_has_not_seen():
    """Even requests go 0 -> 1, odd ones 0 -> 2: what was learnt is wrong for all that is judged."""
    request = np.repeat(np.arange(6), 10)
    ids = np.stack([np.zeros(60, int), 1 + request % 2], 1)[:, :, None]
    table, popular = prediction.table_recall(trace_of(ids, 4, requests=request))
    assert table.recall_LW[0, 0] == 0 and table.top1_L[0] == 0 and popular.recall_LW[0, 0] == 0
    assert prediction.table_recall(trace_of(ids[:10], 4)) is None


def planted(groups, tokens=60, requests=24, seed=0):
    """Requests of some groups, each with experts of its own: 4 of 16 or so."""
    random = np.random.default_rng(seed)
    request = np.repeat(np.arange(requests), tokens)
    own = 16 // groups
    ids = (request % groups * own)[:, None] + random.random((len(request), own)).argsort(axis=1)[:, :2]
    return trace_of(ids[:, None, :], 16, requests=request)


@pytest.mark.parametrize("groups", [2, 4])
def test_planted_topics_are_found(groups):
    trace = planted(groups, tokens=600)
    found = topics.topics(trace)
    assert found.num_topics == groups
    assert found.silhouette_by_number[groups] > 0.7 > max(found.shuffled_by_number.values())
    for group in range(groups):
        assert len(set(found.topic_N[found.requests_N % groups == group])) == 1
    real, dealt, share = topics.request_information(trace)
    assert real - dealt == pytest.approx([np.log2(groups)], abs=0.02)
    assert share == pytest.approx([np.log2(groups) / 4], abs=0.02)


def test_no_topics():
    found = topics.topics(random_trace(0, tokens=3000, requests=30))
    assert max(found.silhouette_by_number.values()) < 0.15
    assert topics.topics(random_trace(0, requests=1)).num_topics == 1
    same = trace_of(np.zeros((40, 1, 1)), 4, requests=np.arange(40) // 4)
    assert topics.topics(same).num_topics == 1
    assert topics.request_information(same)[2].tolist() == [0]


def test_drift_within_requests():
    """Every request moves from experts 0, 1 to 2, 3 halfway: the halves share none, random ones nearly all."""
    random = np.random.default_rng(0)
    late = np.tile(np.arange(100) >= 50, 8)
    trace = trace_of((random.integers(0, 2, 800) + 2 * late)[:, None, None], 4, requests=np.arange(800) // 100)
    drift, by_chance = topics.drift_within_requests(trace)
    assert drift == pytest.approx([1]) and by_chance[0] < 0.05
    over, over_by_chance = topics.drift_over_requests(trace)
    assert over == pytest.approx(over_by_chance, abs=0.01) and over[0] < 0.01


def test_drift_over_requests():
    trace = planted(2, requests=20)
    order = np.argsort(trace.request_T % 2, kind="stable")
    moved = trace_of(trace.expert_ids_TLK[order], 16, requests=np.arange(1200) // 60)
    assert topics.drift_over_requests(moved)[0] == pytest.approx([1])
    assert topics.drift_over_requests(moved)[1][0] < 0.3
    assert topics.drift_over_requests(trace)[0][0] < 0.01
    assert np.isnan(topics.drift_over_requests(random_trace(0, requests=1))).all()


def test_requests_of_one_token_have_no_halves():
    trace = trace_of([[[0]], [[1]]], 4, requests=[0, 1])
    assert np.isnan(topics.drift_within_requests(trace)).all()
