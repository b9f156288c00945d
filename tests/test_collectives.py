"""Collectives: what must arrive arrives, no byte is lost or made, lower bounds, and both ways of timing."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import small_cluster
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.files.hardware import load_cluster
from moesim.network.routes import Fabric
from moesim.network.sends import Sends, seconds
from moesim.policies.collective import (
    ALL_REDUCES,
    ALL_TO_ALLS,
    Coordinated,
    Flat,
    GatherAll,
    InSwitch,
    Leaders,
    LowLatency,
    Rails,
    Ranks,
    Ring,
    TokenTraffic,
    Tree,
    TwoLevel,
    broadcast,
    point_to_point,
    reverse,
    sparse_all_gather,
)


@st.composite
def traffics(draw):
    ranks = Ranks(*draw(st.sampled_from([(1, 4), (3, 4), (4, 4), (8, 4), (12, 4), (6, 1)])))
    tokens, top_k = draw(st.integers(0, 30)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    source_B = rng.integers(0, ranks.num_ranks, tokens)
    target_BK = rng.integers(0, ranks.num_ranks, (tokens, top_k))
    return TokenTraffic.of(ranks, source_B, target_BK, 10.0), source_B, target_BK


def net(schedule, num_ranks):
    """Bytes that each rank has more at the end than at the start."""
    total = sum((sends.matrix(num_ranks) for sends in schedule), np.zeros((num_ranks, num_ranks)))
    return total.sum(axis=0) - total.sum(axis=1)


@given(traffics())
@settings(deadline=None)
def test_traffic_is_counted_as_by_hand(given_):
    traffic, source_B, target_BK = given_
    R, N = traffic.ranks.num_ranks, traffic.ranks.num_nodes
    tokens_RR, tokens_RN, choices_RR = np.zeros((R, R)), np.zeros((R, N)), np.zeros((R, R))
    for source, targets in zip(source_B, target_BK, strict=True):
        for rank in set(targets.tolist()):
            tokens_RR[source, rank] += 1
        for node in {int(traffic.ranks.node_R[rank]) for rank in targets}:
            tokens_RN[source, node] += 1
        for rank in targets:
            choices_RR[source, rank] += 1
    assert (traffic.tokens_RR == tokens_RR).all() and (traffic.tokens_RN == tokens_RN).all()
    assert (traffic.choices_RR == choices_RR).all() and traffic.tokens_R.sum() == len(source_B)


def test_even_traffic_is_what_even_routing_counts():
    ranks = Ranks(8, 4)
    source_B, target_B = (index.ravel() for index in np.indices((8, 8)))  # each rank has a token for each
    counted, even = TokenTraffic.of(ranks, source_B, target_B[:, None], 10.0), TokenTraffic.even(ranks, 80.0)
    assert even.bytes_RR == pytest.approx(counted.bytes_RR)
    for name in ("choices_RR", "tokens_RR", "tokens_RN", "tokens_R"):
        assert getattr(even, name) * 8 == pytest.approx(getattr(counted, name))


@given(traffics())
@settings(deadline=None)
def test_hierarchies_deliver_what_flat_delivers(given_):
    """No byte is lost or made on the way: each rank ends with as much more as by sending straight."""
    traffic, *_ = given_
    R = traffic.ranks.num_ranks
    flat = net(Flat().dispatch(traffic), R)
    for algorithm in (Leaders(), TwoLevel()):
        assert net(algorithm.dispatch(traffic), R) == pytest.approx(flat)


@given(traffics())
@settings(deadline=None)
def test_rails_carry_a_token_once_to_a_node_and_on_to_each_of_its_ranks(given_):
    traffic, source_B, target_BK = given_
    ranks = traffic.ranks
    between, inside = Rails().dispatch(traffic)
    far = sum(len({int(ranks.node_R[r]) for r in targets} - {int(ranks.node_R[s])})
              for s, targets in zip(source_B, target_BK, strict=True))  # fmt: skip
    assert between.bytes_F.sum() == pytest.approx(10.0 * far)
    index = np.arange(ranks.num_ranks) % ranks.per_node
    assert (index[between.source_F] == index[between.target_F]).all()  # rails only
    assert (ranks.node_R[inside.source_F] == ranks.node_R[inside.target_F]).all()
    by_hand = np.zeros((ranks.num_ranks, ranks.num_ranks))
    for source, targets in zip(source_B, target_BK, strict=True):
        for rank in set(targets.tolist()):
            relay = ranks.node_R[rank] * ranks.per_node + index[source]
            by_hand[relay, rank] += 10.0 * (relay != rank)
    assert inside.matrix(ranks.num_ranks) == pytest.approx(by_hand)
    assert between.bytes_F.sum() <= Flat().dispatch(traffic)[0].bytes_F.sum() + 1e-9
    assert Flat().dispatch(traffic)[0].bytes_F.sum() <= LowLatency().dispatch(traffic)[0].bytes_F.sum() + 1e-9


@given(traffics())
@settings(deadline=None)
def test_every_rank_gets_all_tokens_of_the_others(given_):
    traffic, *_ = given_
    (sends,) = GatherAll().dispatch(traffic)
    got_R = sends.matrix(traffic.ranks.num_ranks).sum(axis=0)
    assert got_R == pytest.approx(10.0 * (traffic.tokens_R.sum() - traffic.tokens_R))


@given(traffics(), st.sampled_from([1, 2, 4]))
@settings(deadline=None)
def test_coordinated_sends_stay_in_their_index_and_bring_each_rank_its_tokens(given_, tp):
    traffic, *_ = given_
    R = traffic.ranks.num_ranks
    if R % tp:
        with pytest.raises(ValueError, match="does not divide"):
            Coordinated(tp).dispatch(traffic)
        return
    (sends,) = Coordinated(tp).dispatch(traffic)
    assert (sends.source_F % tp == sends.target_F % tp).all()
    other_group = traffic.bytes_RR.reshape(R // tp, tp, R).sum(axis=1)[:, :]
    own = other_group[np.arange(R) // tp, np.arange(R)]
    assert sends.matrix(R).sum(axis=0) == pytest.approx(other_group.sum(axis=0) - own)  # its own group has them


SIZES = [(2, 4), (4, 4), (8, 4), (12, 4), (3, 4)]


@pytest.mark.parametrize("size", SIZES)
def test_an_all_reduce_moves_at_least_what_any_must(size):
    """Each rank must send and receive 2 (R - 1) / R of the buffer (Patarasuk, Yuan); rings and pairs do just that."""
    ranks, num_bytes = Ranks(*size), 96.0
    for name, made in ALL_REDUCES.items():
        if name == "in_switch":
            continue
        total = sum(sends.matrix(ranks.num_ranks) for sends in made().all_reduce(ranks, num_bytes))
        least = 2 * (ranks.num_ranks - 1) / ranks.num_ranks * num_bytes
        if name in ("ring", "two_shot"):
            assert total.sum(axis=0) == pytest.approx(least) and total.sum(axis=1) == pytest.approx(least)
        assert total.sum() >= least * ranks.num_ranks * (1 - 1e-9), name
        assert total.sum(axis=0) == pytest.approx(total.sum(axis=1))  # what comes back is as much as what went


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 8, 16, 33])
def test_trees_add_up_every_rank_once_and_no_rank_is_busy_twice(num_ranks):
    ranks, chunks = Ranks(num_ranks, num_ranks), 3
    schedule = Tree(chunks).all_reduce(ranks, 60.0)
    half = len(schedule) // 2
    for which in (0, 1):  # each half of the buffer up its own tree
        added = {rank: {chunk: {rank} for chunk in range(chunks)} for rank in range(num_ranks)}
        sent: dict[tuple[int, int], int] = {}
        for sends in schedule[:half]:
            pairs = list(zip(sends.source_F.tolist(), sends.target_F.tolist(), strict=True))
            mine = pairs[: len(pairs) // 2] if which == 0 else pairs[len(pairs) // 2 :]
            for source, target in mine:
                chunk = sent.get((source, target), 0)
                sent[source, target] = chunk + 1
                assert not added[target][chunk] & added[source][chunk]
                added[target][chunk] |= added[source][chunk]
        full = [rank for rank in added if all(len(added[rank][c]) == num_ranks for c in range(chunks))]
        assert len(full) == 1
    assert sum(sends.bytes_F.sum() for sends in schedule) == pytest.approx(2 * (num_ranks - 1) * 60.0)


def test_a_ring_passes_every_share_round():
    for size in SIZES:
        ranks = Ranks(*size)
        schedule = Ring().all_gather(ranks, 12.0)
        have = [{rank} for rank in range(ranks.num_ranks)]
        first = schedule[0]
        channel = slice(0, ranks.num_ranks)  # the first channel's sends come first
        following = dict(zip(first.source_F[channel].tolist(), first.target_F[channel].tolist(), strict=True))
        for _ in schedule:
            have = [have[rank] | have[next(s for s, t in following.items() if t == rank)] for rank in range(len(have))]
        assert all(len(known) == ranks.num_ranks for known in have)


@pytest.mark.parametrize("root", [0, 3])
def test_a_broadcast_reaches_all_from_those_who_have_it(root):
    have = {root}
    for sends in broadcast(Ranks(7, 8), 5.0, root):
        assert set(sends.source_F.tolist()) <= have
        have |= set(sends.target_F.tolist())
    assert have == set(range(7))


def test_a_sparse_all_gather_brings_what_is_missing_from_near():
    ranks = Ranks(8, 4)
    rng = np.random.default_rng(0)
    holds, wants = rng.random((8, 20)) < 0.3, rng.random((8, 20)) < 0.5
    holds[0] = True
    (sends,) = sparse_all_gather(ranks, holds, wants, np.full(20, 2.0))
    assert sends.bytes_F.sum() == 2.0 * (wants & ~holds).sum()
    for rank in range(8):
        assert sends.matrix(8)[:, rank].sum() == 2.0 * (wants & ~holds)[rank].sum()
    crossed = (ranks.node_R[sends.source_F] != ranks.node_R[sends.target_F]).sum()
    must = sum(not holds[4 * (r // 4) : 4 * (r // 4) + 4, i].any() for r, i in np.argwhere(wants & ~holds))
    assert crossed == must
    assert sparse_all_gather(ranks, holds, holds, np.ones(20)) == []
    with pytest.raises(ValueError, match="wanted by rank 1 and held by none"):
        sparse_all_gather(Ranks(2, 2), np.zeros((2, 1), bool), np.array([[False], [True]]), np.ones(1))


def test_groups_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="the group is empty"):
        Ranks(0, 8)
    with pytest.raises(ValueError, match="do not fill nodes of 4"):
        Ranks(6, 4)
    with pytest.raises(ValueError, match="inside one node"):
        InSwitch().all_reduce(Ranks(8, 4), 1.0)


# Time


@given(traffics(), st.floats(1e-7, 1e-5), st.floats(0.0, 100.0))
@settings(deadline=None, max_examples=40)
def test_played_is_never_faster_than_the_fullest_link(given_, start_s, half_size):
    traffic, *_ = given_
    ranks = traffic.ranks
    if ranks.per_node != 4:
        return
    fabric = FABRICS[ranks.num_nodes]
    for made in ALL_TO_ALLS.values():
        schedule = made().dispatch(traffic)
        bound = seconds(schedule, fabric, start_s, half_size)
        exact = seconds(schedule, fabric, start_s, half_size, is_played=True, tolerance=0.0)
        assert all(a <= b * (1 + 1e-9) for a, b in zip(bound, exact, strict=True))
        rough = seconds(schedule, fabric, start_s, half_size, is_played=True)
        assert rough == pytest.approx(exact, rel=0.05)


FABRICS = {nodes: Fabric(small_cluster(nodes=nodes)) for nodes in (1, 2, 3)}


def test_an_even_all_to_all_takes_what_ports_say_either_way():
    ranks, fabric = Ranks(8, 4), FABRICS[2]
    sends = Sends.of_matrix(np.full((8, 8), 1e6))
    far = 4 * 1e6 / 1e9  # 4 peers in the other node, each NIC 1 GB/s
    latency = max(seconds([Sends.of_matrix(np.full((8, 8), 1e-9))], fabric))
    assert seconds([sends], fabric) == pytest.approx([far])
    (played,) = seconds([sends], fabric, is_played=True, tolerance=0.0)
    assert far <= played <= far + latency * 1.01
    assert ranks.num_nodes == 2


def test_many_small_messages_are_slower_than_few_large_ones():
    """What hierarchies are for: with a size at which messages reach half of the rate, leaders win on small batches."""
    fabric, ranks = Fabric(load_cluster("4 x hgx-h100")), Ranks(32, 8)
    rng = np.random.default_rng(0)
    small, large = (
        TokenTraffic.of(ranks, rng.integers(0, 32, n), rng.integers(0, 32, (n, 2)), 4096.0) for n in (2048, 262144)
    )
    for traffic, wins in ((small, True), (large, False)):
        times = {name: sum(seconds(ALL_TO_ALLS[name]().dispatch(traffic), fabric, 2e-6, 64e3))
                 for name in ("flat", "two_level")}  # fmt: skip
        assert (times["two_level"] < times["flat"]) == wins


def test_the_way_back_is_the_way_there_turned_round():
    traffic = TokenTraffic.of(Ranks(8, 4), np.arange(8), (np.arange(8)[:, None] + [1, 5]) % 8, 7.0)
    there = Rails().dispatch(traffic)
    back = reverse(there)
    assert [sends.matrix(8).T.tolist() for sends in back] == [sends.matrix(8).tolist() for sends in there[::-1]]
    assert point_to_point(2, 2, 9.0)[0].bytes_F.size == 0 and point_to_point(2, 3, 9.0)[0].bytes_F.tolist() == [9.0]


def test_a_switch_adds_up_in_half_the_bytes_of_pairs():
    fabric = Fabric(load_cluster("hgx-h100"))
    ranks = Ranks(8, 8)
    pairs, switch = (
        sum(seconds(ALL_REDUCES[name]().all_reduce(ranks, 1e9), fabric)) for name in ("two_shot", "in_switch")
    )
    assert switch == pytest.approx(pairs * (9 / 8) / (14 / 8), rel=1e-3)
