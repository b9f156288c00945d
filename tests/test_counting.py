"""The compiled counting against a plain twin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.policies.collective import LowLatency, Rails, Ranks, TokenTraffic
from moesim.policies.placement import PLACEMENTS, Contiguous
from moesim.routing.counting import Counter
from moesim.routing.pool import RoutingPool
from moesim.routing.synthetic import zipf_trace


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(PLACEMENTS)),
    st.sampled_from([2, 4]),
    st.integers(1, 2),
    st.sampled_from([0, 4]),
    st.integers(0, 9),
)
def test_counts_equal_a_plain_twin(name, ep, num_groups, redundant, seed):
    num_experts, num_slots, num_ranks = 8, 8 + redundant, ep * num_groups
    trace = zipf_trace(3, num_experts, 2, num_requests=6, prompt_tokens=3, output_tokens=2, seed=seed)
    placement = PLACEMENTS[name]().place(num_slots, ep, 4, np.ones((3, num_experts)))
    node_R = (np.arange(num_ranks) // 2).astype(np.int32)
    rng = np.random.default_rng(seed)
    rows_B = rng.integers(0, trace.num_tokens, 20)
    source_B = rng.integers(0, num_ranks, 20).astype(np.int32)
    counts = Counter(placement, num_experts, num_ranks, node_R).count(trace.expert_ids_TLK, rows_B, source_B)

    load, traffic = plain_counts(counts, trace.expert_ids_TLK[rows_B], source_B, np.arange(20), placement, node_R)
    np.testing.assert_array_equal(counts.load_LRS, load)
    np.testing.assert_array_equal(counts.traffic_CLR, traffic)


def plain_counts(like, ids_BLK, source_B, choice_B, placement, node_R):
    """The twin: token by token, sets for what was sent; arrays shaped as those of `like`."""
    load, traffic = np.zeros_like(like.load_LRS), np.zeros_like(like.traffic_CLR)
    slots_per_rank = load.shape[2]
    for ids_LK, source, choice in zip(ids_BLK, source_B, choice_B, strict=True):
        for layer, ids_K in enumerate(ids_LK):
            sent = set()
            for expert in ids_K:
                copies = np.flatnonzero(placement.slot_expert_LP[layer] == expert)
                slot = copies[choice % len(copies)]
                rank = source // placement.ep * placement.ep + slot // slots_per_rank
                load[layer, rank, slot % slots_per_rank] += 1
                if rank != source and rank not in sent:
                    sent.add(rank)
                    far = int(node_R[rank] != node_R[source])
                    traffic[far, layer, source] += 1
                    traffic[2 + far, layer, rank] += 1
    return load, traffic


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["choice", "node"]), st.sampled_from([2, 4, 8]), st.sampled_from([0, 8]), st.integers(0, 9))
def test_other_messages_are_those_of_the_algorithms(message, ep, redundant, seed):
    """By each rank's ports, counts are what the rounds of `LowLatency` and `Rails` add up to."""
    num_ranks, ranks = 8, Ranks(8, 2)
    trace = zipf_trace(3, 8, 2, num_requests=6, prompt_tokens=3, output_tokens=2, seed=seed)
    placement = Contiguous().place(8 + redundant, ep, 2, np.ones((3, 8)))
    rng = np.random.default_rng(seed)
    rows_B, source_B = rng.integers(0, trace.num_tokens, 20), rng.integers(0, num_ranks, 20).astype(np.int32)
    counter = Counter(placement, 8, num_ranks, ranks.node_R.astype(np.int32), message)
    counts = counter.count(trace.expert_ids_TLK, rows_B, source_B)
    counts = counter.with_targets(counts, trace.expert_ids_TLK, rows_B, source_B)
    algorithm = {"choice": LowLatency, "node": Rails}[message]()
    for layer, target_BK in enumerate(counts.target_LBK):
        schedule = algorithm.dispatch(TokenTraffic.of(ranks, source_B.astype(np.int64), target_BK, 1.0))
        expected = np.zeros((4, num_ranks))
        for sends in schedule:
            far_F = (ranks.node_R[sends.source_F] != ranks.node_R[sends.target_F]).astype(int)
            np.add.at(expected, (far_F, sends.source_F), sends.bytes_F)
            np.add.at(expected, (2 + far_F, sends.target_F), sends.bytes_F)
        np.testing.assert_array_equal(counts.traffic_CLR[:, layer], expected)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(PLACEMENTS)),
    st.sampled_from([2, 4]),
    st.integers(1, 2),
    st.sampled_from([0, 4]),
    st.sampled_from(["rank", "choice"]),
    st.booleans(),
    st.integers(0, 9),
)
def test_windows_of_the_pool_equal_token_by_token(name, ep, num_groups, redundant, message, chained, seed):
    num_ranks = ep * num_groups
    trace = zipf_trace(3, 8, 2, num_requests=6, prompt_tokens=3, output_tokens=2, seed=seed)
    placement = PLACEMENTS[name]().place(8 + redundant, ep, 4, np.ones((3, 8)))
    node_R = (np.arange(num_ranks) // 2).astype(np.int32)
    rng = np.random.default_rng(seed)
    rows_T, choice_T = rng.integers(0, trace.num_tokens, 40), rng.integers(0, 9, 40)
    source_W = np.sort(rng.integers(0, num_ranks, 7))  # some ranks have several windows, some none
    edges = np.sort(rng.integers(0, 41, 8))
    first_W, tokens_W = edges[:-1], np.diff(edges)  # empty ones among them
    if not chained:
        order = rng.permutation(7)
        first_W, tokens_W = first_W[order], tokens_W[order]
    places_U = np.unique(edges)
    pool = RoutingPool(
        trace.expert_ids_TLK, rows_T, choice_T, placement, 8, num_ranks, node_R, message, places_U
    )  # fmt: skip
    counts = pool.count(source_W, first_W, tokens_W)
    places_B = np.concatenate([f + np.arange(n) for f, n in zip(first_W, tokens_W, strict=True)])
    source_B, choice_B = np.repeat(source_W, tokens_W).astype(np.int32), choice_T[places_B]
    counter = Counter(placement, 8, num_ranks, node_R, message)
    wanted = counter.count(trace.expert_ids_TLK, rows_T[places_B], source_B, choice_B)
    np.testing.assert_array_equal(counts.load_LRS, wanted.load_LRS)
    np.testing.assert_array_equal(counts.traffic_CLR, wanted.traffic_CLR)
    if message == "rank":
        ids_BLK = trace.expert_ids_TLK[rows_T[places_B]]
        load, traffic = plain_counts(counts, ids_BLK, source_B, choice_B, placement, node_R)
        np.testing.assert_array_equal(counts.load_LRS, load)
        np.testing.assert_array_equal(counts.traffic_CLR, traffic)


def one_expert_pool(num_tokens, places, message="rank"):
    """Tokens that all choose expert 0, on rank 0 of two."""
    ids_TLK = np.zeros((num_tokens, 1, 1), np.uint8)
    placement, rows_T = PLACEMENTS["contiguous"]().place(2, 2, 2, np.zeros((1, 2))), np.arange(num_tokens)
    return RoutingPool(ids_TLK, rows_T, rows_T, placement, 2, 2, np.zeros(2, np.int32), message, np.array(places))


def test_totals_that_wrap_around_leave_windows_exact():
    """A pool of more than 2^16 tokens of one expert: its totals pass 2^16, and so do windows that follow each other."""
    pool = one_expert_pool(140_000, [0, 100, 65_535, 65_600, 131_100, 140_000])
    for first, tokens in ((0, 65_535), (65_535, 65), (65_600, 65_500), (131_100, 8_900)):
        counts = pool.count(np.array([1]), np.array([first]), np.array([tokens]))
        assert counts.load_LRS[0, 0, 0] == tokens and counts.traffic_CLR[0, 0, 1] == tokens
    counts = pool.count(np.array([0, 1]), np.array([0, 65_535]), np.array([65_535, 65]))
    assert counts.load_LRS[0, 0, 0] == 65_600 and counts.traffic_CLR[0, 0].tolist() == [0, 65]
    counts = pool.count(np.array([0, 1, 1]), np.array([100, 65_600, 131_100]), np.array([65_435, 65_500, 8_900]))
    assert counts.load_LRS[0, 0, 0] == 65_435 + 65_500 + 8_900


def test_windows_outside_the_pool_are_refused():
    pool = one_expert_pool(10, [0, 5, 10])
    for first, tokens in ((10, 5), (-5, 5), (0, 11), (5, -5), (0, 4), (3, 2)):
        with pytest.raises(ValueError, match=r"windows must lie in 0\.\.10, hold 0\.\.65535 tokens"):
            pool.count(np.array([0]), np.array([first]), np.array([tokens]))
    with pytest.raises(ValueError, match="by rank or by choice, given 'node'"):
        one_expert_pool(10, [0, 10], "node")


def test_a_placement_without_a_home_for_an_expert_is_refused():
    placement = PLACEMENTS["contiguous"]().place(8, 4, 4, np.zeros((1, 8)))
    placement.slot_expert_LP[0, 3] = 0
    try:
        Counter(placement, 8, 4, np.zeros(4, np.int32))
    except ValueError as error:
        assert "expert 3 of MoE layer 0 has no slot" in str(error)
    else:
        raise AssertionError("accepted")
