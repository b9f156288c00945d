"""Routing variants: each against a plain loop of its rule, and the laws of load, capacity, traffic and time."""

from dataclasses import replace
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moesim.studies import scmoe
from routing_cases import gpt_oss

from moesim.costs.moe_layer import layer_effects, rank_messages, source_ranks, traffic
from moesim.files.hardware import load_cluster
from moesim.files.scenarios import load_trace
from moesim.layout import Placement
from moesim.model import Experts
from moesim.routing.capacity import (
    ORDERS,
    capacity,
    capped,
    expert_choice,
    moe_plus_plus_capacity,
    moe_plus_plus_share,
)
from moesim.routing.counting import Counter
from moesim.routing.scores import gate_weights_TE, with_scores
from moesim.routing.variants import (
    Routed,
    adjugate,
    arithmetic_widths,
    multi_head,
    ranked,
    relu_gate,
    skip_light,
    softmax,
    task_level,
    top_k,
    top_p,
)


@st.composite
def scores(draw, most_tokens=20):
    T, E = draw(st.integers(1, most_tokens)), draw(st.integers(2, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Few distinct values, so that ties are common.
    return rng.integers(0, 5, (T, E)) / 2 if draw(st.booleans()) else rng.normal(size=(T, E))


def best_first(score_E):
    return sorted(range(len(score_E)), key=lambda e: (-score_E[e], e))


# Each rule against a loop


@settings(deadline=None)
@given(scores(), st.data())
def test_top_k_is_the_k_best_by_id_where_they_tie(scores_TE, data):
    E = scores_TE.shape[1]
    k = data.draw(st.integers(0, E))
    routed = top_k(scores_TE, k)
    for t, score_E in enumerate(scores_TE):
        assert set(np.flatnonzero(routed.chosen_TE[t])) == set(best_first(score_E)[:k])
    assert top_k(scores_TE, E).chosen_TE.all()


@settings(deadline=None)
@given(scores(), st.floats(0.01, 1))
def test_top_p_stops_as_soon_as_p_is_reached(scores_TE, p):
    probability_TE = softmax(scores_TE)
    routed = top_p(probability_TE, p)
    for t, probability_E in enumerate(probability_TE):
        order, total, taken = best_first(probability_E), 0.0, []
        while not taken or (total < p - 1e-12 and len(taken) < len(order)):
            taken.append(order[len(taken)])
            total += probability_E[taken[-1]]
        assert set(np.flatnonzero(routed.chosen_TE[t])) == set(taken)
    np.testing.assert_array_equal(top_p(probability_TE, p, 1).chosen_TE, top_k(probability_TE, 1).chosen_TE)
    assert top_p(probability_TE, 1.0).chosen_TE.all()


@settings(deadline=None)
@given(scores(), st.floats(0, 1))
def test_relu_gate_has_the_wanted_mean_and_one_threshold(scores_TE, share):
    T, E = scores_TE.shape
    chosen_TE = relu_gate(scores_TE, share * E).chosen_TE
    if np.unique(scores_TE).size == scores_TE.size:
        assert chosen_TE.sum() == round(T * share * E)
    assert chosen_TE.sum() <= round(T * share * E)
    if chosen_TE.any() and not chosen_TE.all():
        assert scores_TE[chosen_TE].min() > scores_TE[~chosen_TE].max()


@settings(deadline=None)
@given(scores(), st.integers(1, 9), st.floats(0, 1))
def test_skipping_keeps_the_best_and_all_at_ratio_0(scores_TE, k, ratio):
    probability_TE, whole = softmax(scores_TE), top_k(scores_TE, min(k, scores_TE.shape[1]))
    kept_TE = skip_light(whole, probability_TE, ratio).chosen_TE
    for t, probability_E in enumerate(probability_TE):
        mine = [e for e in best_first(probability_E) if whole.chosen_TE[t, e]]
        assert set(np.flatnonzero(kept_TE[t])) == {
            e for e in mine if probability_E[e] >= ratio * probability_E[mine[0]]
        }
    assert (kept_TE & top_k(scores_TE, 1).chosen_TE).any(axis=1).all()
    np.testing.assert_array_equal(skip_light(whole, probability_TE, 0.0).chosen_TE, whole.chosen_TE)


@settings(deadline=None)
@given(scores(), st.sampled_from(ORDERS[:3]), st.integers(1, 4), st.integers(0, 5), st.integers(1, 3))
def test_capacity_is_filled_in_order_and_drops_are_counted(scores_TE, order, k, places, num_groups):
    T, E = scores_TE.shape
    group_T = np.arange(T) * 7 % num_groups
    routed = top_k(scores_TE, min(k, E))
    found = capped(routed, scores_TE, places, order, group_T)
    for e in range(E):
        for g in range(num_groups):
            queue = [t for t in range(T) if group_T[t] == g and routed.chosen_TE[t, e]]
            key = {
                "position": lambda t: t,
                "choice": lambda t, e=e: (best_first(scores_TE[t]).index(e), t),
                "priority": lambda t: (-scores_TE[t].max(), t),
            }[order]
            kept = sorted(queue, key=key)[:places]
            assert {t for t in queue if found.chosen_TE[t, e]} == set(kept)
    np.testing.assert_array_equal(found.chosen_TE ^ found.dropped_TE, routed.chosen_TE)


@settings(deadline=None)
@given(scores(), st.integers(0, 6), st.integers(0, 3))
def test_random_order_fills_every_place_and_differs_by_seed_alone(scores_TE, places, seed):
    routed = top_k(scores_TE, 2)
    found = capped(routed, scores_TE, places, "random", seed=seed)
    np.testing.assert_array_equal(found.load_E, np.minimum(routed.load_E, places))
    again = capped(routed, scores_TE, places, "random", seed=seed)
    np.testing.assert_array_equal(found.chosen_TE, again.chosen_TE)


@settings(deadline=None)
@given(scores(), st.data())
def test_expert_choice_loads_are_equal_and_its_tokens_the_best(scores_TE, data):
    T, E = scores_TE.shape
    places = data.draw(st.integers(0, T))
    chosen_TE = expert_choice(scores_TE, places).chosen_TE
    for e in range(E):
        assert set(np.flatnonzero(chosen_TE[:, e])) == set(best_first(scores_TE[:, e])[:places])
    assert expert_choice(scores_TE, T).chosen_TE.all()


@settings(deadline=None)
@given(scores(), st.integers(1, 4))
def test_a_task_has_one_set_and_a_task_per_token_is_top_k(scores_TE, num_tasks):
    T, _E = scores_TE.shape
    probability_TE, task_T = softmax(scores_TE), np.arange(T) % num_tasks
    routed = task_level(probability_TE, task_T, 2)
    for task in range(num_tasks):
        mine = routed.chosen_TE[task_T == task]
        assert (mine == mine[:1]).all()
        if len(mine):
            assert set(np.flatnonzero(mine[0])) == set(best_first(probability_TE[task_T == task].sum(axis=0))[:2])
    alone = task_level(probability_TE, np.arange(T), 2)
    np.testing.assert_array_equal(alone.chosen_TE, top_k(probability_TE, 2).chosen_TE)


@settings(deadline=None)
@given(scores(), st.integers(1, 4))
def test_sub_tokens_are_routed_by_themselves(scores_TE, heads):
    scores_THE = np.stack([np.roll(scores_TE, h, axis=1) for h in range(heads)], axis=1)
    routed = multi_head(scores_THE, 1)
    assert routed.chosen_TE.shape == (scores_TE.shape[0] * heads, scores_TE.shape[1])
    for t in range(len(scores_TE)):
        for h in range(heads):
            assert np.flatnonzero(routed.chosen_TE[t * heads + h]).tolist() == [best_first(scores_THE[t, h])[0]]


@settings(deadline=None)
@given(scores())
def test_places_are_a_permutation(scores_TE):
    assert (np.sort(ranked(scores_TE), axis=1) == np.arange(scores_TE.shape[1])).all()


# Free experts


def test_null_experts_are_chosen_and_cost_nothing():
    scores_TE = np.array([[3.0, 2, 1, 0], [0, 1, 2, 3], [3, 0, 2, 1]])
    routed = top_k(scores_TE, 2, num_free=2)
    assert routed.chosen_TE.sum(axis=1).tolist() == [2, 2, 2]
    assert routed.computed_TE.sum(axis=1).tolist() == [2, 0, 1]
    assert routed.mean_experts == 1.0
    assert top_k(scores_TE, 2).mean_experts == 2.0


@settings(deadline=None)
@given(st.floats(0.05, 1), st.integers(1, 32), st.integers(0, 8))
def test_moe_plus_plus_share_is_that_of_full_capacity(tau, num_ffn, num_free):
    places_E = moe_plus_plus_capacity(tau, 1.0, 10**9, num_ffn, num_free)
    assert places_E[:num_ffn].sum() / places_E.sum() == pytest.approx(moe_plus_plus_share(tau, num_ffn, num_free))
    assert 10**9 <= places_E.sum() <= 10**9 + len(places_E)


def test_moe_plus_plus_without_free_experts_is_switch_capacity():
    assert moe_plus_plus_capacity(1.0, 1.25, 1000, 8, 0).tolist() == [capacity(1.25, 1000, 1, 8)] * 8
    # 3 of 4 FFN-seeking tokens are refused once tau closes the FFN experts.
    places_E = moe_plus_plus_capacity(0.1, 1.0, 12, 2, 1)
    routed = capped(top_k(np.tile([3.0, 2, 1], (12, 1)), 1, num_free=1), np.zeros((12, 3)), places_E)
    assert places_E.tolist() == [1, 1, 10] and routed.load_E.tolist() == [1, 0, 0] and routed.dropped_TE.sum() == 11


# Grove, HMoE


def test_touched_groups_of_random_routing():
    rng = np.random.default_rng(0)
    touched = adjugate(top_k(rng.random((20000, 128)), 8), 64).sum(axis=1)
    assert touched.mean() == pytest.approx(64 * (1 - comb(126, 8) / comb(128, 8)), rel=2e-3)
    assert touched.min() >= 4 and touched.max() <= 8


def test_arithmetic_widths():
    assert arithmetic_widths(9, 23, 8) == (9, 11, 13, 15, 17, 19, 21, 23) and sum(arithmetic_widths(9, 23, 8)) == 128
    assert arithmetic_widths(16, 16, 8) == (16,) * 8
    with pytest.raises(ValueError, match="whole numbers"):
        arithmetic_widths(9, 22, 8)


# Buffer overflow


@settings(max_examples=40, deadline=None)
@given(scores(), scores(), st.sampled_from(ORDERS[:3]), st.integers(1, 3))
def test_with_places_per_request_batch_mates_change_nothing(mine_TE, mates_TE, order, places):
    E = min(mine_TE.shape[1], mates_TE.shape[1])
    alone_TE = mine_TE[:, :E]
    together_TE = np.concatenate([mates_TE[:, :E], alone_TE])
    request_T = np.repeat([0, 1], [len(mates_TE), len(alone_TE)])
    alone = capped(top_k(alone_TE, 2), alone_TE, places, order)
    together = capped(top_k(together_TE, 2), together_TE, places, order, request_T)
    np.testing.assert_array_equal(together.chosen_TE[len(mates_TE) :], alone.chosen_TE)


def test_with_places_per_batch_a_mate_can_take_them():
    mine_TE, mate_TE = np.array([[1.0, 0.0]]), np.array([[2.0, 0.0]])
    together_TE = np.concatenate([mate_TE, mine_TE])
    for order in ORDERS[:3]:
        assert capped(top_k(mine_TE, 1), mine_TE, 1, order).chosen_TE[0, 0]
        assert not capped(top_k(together_TE, 1), together_TE, 1, order).chosen_TE[1, 0]
    # Enough slack for everyone to choose the same expert makes it safe again.
    assert capped(top_k(together_TE, 1), together_TE, 2).chosen_TE[1, 0]
    # The mate's harm needs an overflow: with the order drawn by lot it happens to about half of the batches.
    lost = [not capped(top_k(together_TE, 1), together_TE, 1, "random", seed=s).chosen_TE[1, 0] for s in range(200)]
    assert 0.35 < np.mean(lost) < 0.65


# Effects


@settings(deadline=None)
@given(scores(), st.sampled_from([1, 2, 4]))
def test_messages_against_a_loop_over_tokens(scores_TE, num_ranks):
    paid_TE = top_k(np.tile(scores_TE, (1, 4)), 2).chosen_TE
    source_T, per_rank = source_ranks(len(paid_TE), num_ranks), paid_TE.shape[1] // num_ranks
    sent = set()
    for t, e in zip(*np.nonzero(paid_TE), strict=True):
        if e // per_rank != source_T[t]:
            sent.add((t, e // per_rank))
    sent_RR = rank_messages(paid_TE, num_ranks)
    assert sent_RR.sum() == len(sent)
    for source in range(num_ranks):
        for rank in range(num_ranks):
            assert sent_RR[source, rank] == sum(1 for t, r in sent if source_T[t] == source and r == rank)


def test_messages_between_nodes_against_a_loop():
    routed = relu_gate(np.random.default_rng(3).normal(size=(100, 32)), 2.5)  # from 0 to many experts for a token
    effects = layer_effects(routed, Experts((64,) * 32, 2), 128, load_cluster("2 x hgx-h100"), 16)
    sent = set()
    for t, e in zip(*np.nonzero(routed.chosen_TE), strict=True):
        if e // 16 != (t * 16 // 100) // 8:
            sent.add((t, e // 16))
    assert effects.node_messages == len(sent)
    assert effects.flops == 250 * 2 * 3 * 128 * 64 and effects.distinct_experts == 32


def test_of_top_k_the_counts_are_those_of_the_library():
    """A real trace, 16 ranks on two nodes: load, messages and traffic as `routing.counting` has them."""
    trace = load_trace("olmoe-shape-16x64")
    rows, ep = np.arange(512), 16
    cluster = load_cluster("2 x hgx-h100")
    node_R = np.arange(ep, dtype=np.int32) // 8
    placement = Placement(np.tile(np.arange(64, dtype=np.int32), (16, 1)), ep)
    counts = Counter(placement, 64, ep, node_R).count(
        trace.expert_ids_TLK, rows, source_ranks(512, ep).astype(np.int32)
    )
    scores_TLE = with_scores(trace.take(rows), np.ones((16, 64)), np.random.default_rng(0)).scores_TLE
    for layer in (0, 15):
        by_id_TE = np.zeros((512, 64), bool)
        np.put_along_axis(by_id_TE, trace.expert_ids_TLK[rows, layer].astype(int), True, axis=1)
        np.testing.assert_array_equal(by_id_TE.reshape(512, ep, 4).sum(axis=0), counts.load_LRS[layer])
        np.testing.assert_array_equal(
            traffic(rank_messages(by_id_TE, ep), node_R.astype(np.int64))[:, 0], counts.traffic_CLR[:, layer]
        )
        effects = layer_effects(Routed.of(by_id_TE), Experts((1024,) * 64, 8), 2048, cluster, ep)
        assert effects.rank_messages == counts.traffic_CLR[:2, layer].sum()
        assert effects.flops == 512 * 8 * 2 * 3 * 2048 * 1024
        assert effects.node_messages <= effects.rank_messages <= 512 * 8
        # Half precision may tie two scores of the trace, which is all that may differ.
        agree = (top_k(scores_TLE[:, layer].astype(float), 8).chosen_TE == by_id_TE).mean()
        assert agree > 0.998


def test_effects_of_limits():
    cluster, ffn = load_cluster("hgx-h100"), Experts((512,) * 16, 4)
    rng = np.random.default_rng(1)
    scores_TE = rng.normal(size=(256, 16))
    whole, one = (layer_effects(top_k(scores_TE, k), ffn, 1024, cluster, 8) for k in (4, 1))
    assert one.flops * 4 == whole.flops and one.seconds < whole.seconds and one.rank_messages < whole.rank_messages
    alone = layer_effects(top_k(scores_TE, 4), ffn, 1024, cluster, 1)
    assert alone.rank_messages == alone.node_messages == 0 and alone.dispatch_s == 0 and alone.rank_imbalance == 1
    nothing = layer_effects(Routed.of(np.zeros((4, 16), bool)), ffn, 1024, cluster, 8)
    assert nothing.flops == nothing.experts_s == nothing.distinct_experts == 0 and np.isnan(nothing.rank_imbalance)
    free = layer_effects(
        top_k(rng.normal(size=(256, 20)), 4, num_free=4), Experts((512,) * 16 + (0,) * 4, 4), 1024, cluster, 8
    )
    assert free.flops < whole.flops
    chosen = layer_effects(expert_choice(scores_TE, 64), ffn, 1024, cluster, 8)
    assert chosen.rank_imbalance == 1 and chosen.flops == whole.flops


def test_effects_of_widths():
    """A token at a wide expert costs its width."""
    ffn = Experts(arithmetic_widths(9, 23, 8), 1)
    chosen_TE = np.eye(8, dtype=bool)
    effects = layer_effects(Routed.of(chosen_TE), ffn, 10, load_cluster("h100-x1"), 1)
    assert effects.flops == 2 * 3 * 10 * 128


def test_sub_tokens_move_the_same_bytes_to_one_rank():
    """Two halves that agree are two messages of half the width: equal bytes; halves that differ may need two ranks."""
    scores_TE = np.array([[0.0, 1.0, 0.0, 0.0]])
    paid_TE = multi_head(np.stack([scores_TE, scores_TE], axis=1), 1).chosen_TE
    assert paid_TE.shape == (2, 4) and paid_TE[:, 1].all()
    assert rank_messages(np.repeat(paid_TE, 2, axis=0), 2).sum() == 2  # tokens of rank 1 come to rank 0


# ScMoE's programs, and what a trace says


@settings(deadline=None)
@given(st.floats(0, 5), st.floats(0, 5), st.floats(0, 5), st.floats(0, 5))
def test_a_shortcut_hides_what_fits_and_never_more_than_its_window(attention, mlp, exchange, gate):
    times = scmoe.Times(attention, mlp, exchange, gate)
    computed = 2 * attention + 3 * mlp + gate
    assert scmoe.plain(times, 1, shared=True) == pytest.approx(computed + exchange)
    windows = attention + mlp, attention + 2 * mlp, 2 * attention + 2 * mlp
    found = [scmoe.shortcut(times, position) for position in ("Pos-1", "Pos-2", "Pos-3")]
    for seconds, window in zip(found, windows, strict=True):
        assert computed + max(exchange - window, 0) <= seconds + 1e-9 <= computed + exchange + 2e-9
    assert found[0] + 1e-9 >= found[1] and found[1] + 1e-9 >= found[2]
    # Each half of an exchange that is no longer than either end of its window hides whole.
    short = scmoe.Times(attention, mlp, 2 * min(attention, mlp), gate)
    assert scmoe.shortcut(short, "Pos-1") == pytest.approx(computed)


@settings(deadline=None)
@given(st.floats(0.01, 5), st.floats(0, 5), st.integers(1, 2), st.integers(2, 4))
def test_chunks_hide_at_most_the_smaller_of_experts_and_exchange(mlp, exchange, k, chunks):
    times = scmoe.Times(1.0, mlp, exchange, 0.5)
    whole, cut = scmoe.plain(times, k), scmoe.plain(times, k, chunks=chunks)
    assert whole - min(k * mlp, k * exchange) - 1e-9 <= cut <= whole + 1e-9


def test_gate_weights_lie_at_the_experts_of_the_trace():
    trace = load_trace("olmoe-shape-16x64").take(slice(0, 50))
    weight_TE = gate_weights_TE(trace, 3)
    assert ((weight_TE > 0).sum(axis=1) == 8).all()
    np.testing.assert_allclose(weight_TE.sum(axis=1), trace.weights_TLK[:, 3].astype(float).sum(axis=1))
    # Half precision ties some weights, and then the lower id comes first: sets agree, orders need not.
    chosen_TE = top_k(weight_TE, 8).chosen_TE
    assert all(chosen_TE[t, trace.expert_ids_TLK[t, 3]].all() for t in range(50))
    with pytest.raises(ValueError, match="no gate weights"):
        gate_weights_TE(replace(trace, weights_TLK=None), 0)


def test_on_real_routing_more_places_drop_less_and_a_request_has_fewer_experts_than_chance():
    trace = gpt_oss()
    K, E, rows = trace.top_k, trace.num_experts, slice(0, 1024)
    for layer in (0, trace.num_layers // 2, trace.num_layers - 1):
        chosen_TE = np.zeros((1024, E), bool)
        np.put_along_axis(chosen_TE, trace.expert_ids_TLK[rows, layer].astype(int), True, axis=1)
        drops = [
            int(capped(Routed.of(chosen_TE), chosen_TE * 1.0, capacity(f, 1024, K, E)).dropped_TE.sum())
            for f in (0.5, 1.0, 2.0, E / K)
        ]
        # At half of the even load all places are filled, unless an expert is wanted by fewer.
        assert drops == sorted(drops, reverse=True) and drops[0] >= 1024 * K // 2 and drops[-1] == 0
        used = chosen_TE.reshape(-1, 16, E).any(axis=1).sum(axis=1).mean()
        assert used < E * (1 - (1 - K / E) ** 16)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: top_k(np.zeros((2, 4)), 5), "k = 5"),
        (lambda: top_p(np.ones((2, 2)) / 2, 0.0), "p = 0.0"),
        (lambda: relu_gate(np.zeros((2, 4)), 5), "mean_k = 5"),
        (lambda: adjugate(top_k(np.zeros((2, 4)), 1), 3), "3 equal groups"),
        (lambda: capped(top_k(np.zeros((2, 4)), 1), np.zeros((2, 4)), 1, "last"), "'last'"),
        (lambda: expert_choice(np.zeros((2, 4)), 3), "3 tokens"),
        (
            lambda: layer_effects(top_k(np.zeros((2, 4)), 1), Experts((8,) * 4, 1), 8, load_cluster("h100-x1"), 3),
            "ep = 3",
        ),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
