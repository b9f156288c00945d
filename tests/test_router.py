"""Routers: the contract of all of them, what each does on hand-made fleets, and what a decision costs."""

from collections import Counter
from time import perf_counter

import numpy as np
import pytest

from moesim.faults import ServingFault, overlapping
from moesim.policies.router import ROUTERS, Arrival, KvAware, PrefixAware, RouterView, expert_votes

rng = np.random.default_rng


def fleet(instances=3, ranks=2) -> RouterView:
    return RouterView.idle(instances, ranks, 1000)


def busy(seed, instances=4, ranks=2) -> RouterView:
    view, random = fleet(instances, ranks), rng(seed)
    for array in (view.waiting_ID, view.running_ID, view.waiting_tokens_ID, view.kv_tokens_ID, view.work_tokens_ID):
        array[:] = random.integers(0, 100, array.shape)
    cached = random.integers(0, 500, (50, instances, ranks))
    votes = random.random((50, instances, ranks))
    view.cached_tokens, view.votes = cached.__getitem__, votes.__getitem__
    return view


@pytest.mark.parametrize("name", ROUTERS)
def test_contract(name):
    """Deterministic, never to an instance that is down, changes nothing in the view, and two runs do not touch."""
    view = busy(1)
    before = [array.copy() for array in (view.waiting_ID, view.running_ID, view.kv_tokens_ID, view.waiting_tokens_ID)]
    one, two = (ROUTERS[name]().start(view, rng(7)) for _ in range(2))
    arrivals = [Arrival(q, 500, q % 5) for q in range(50)]
    places = [one(arrival) for arrival in arrivals]
    assert places == [two(arrival) for arrival in arrivals]
    assert all(0 <= place < 8 for place in places)
    view.up_I[[0, 2]] = False
    assert {one(arrival) // 2 for arrival in arrivals} <= {1, 3}
    view.up_I[:] = [False, False, False, True]
    assert {one(arrival) // 2 for arrival in arrivals} == {3}
    for array, old in zip(
        (view.waiting_ID, view.running_ID, view.kv_tokens_ID, view.waiting_tokens_ID), before, strict=True
    ):
        assert (array == old).all()
    view.up_I[:] = False
    with pytest.raises(RuntimeError, match="no instance is up"):
        one(arrivals[0])


@pytest.mark.parametrize("name", [n for n in ROUTERS if not getattr(ROUTERS[n], "needs_future", False)])
def test_blind_to_the_future(name):
    view, other = busy(3), busy(3)
    other.work_tokens_ID = other.work_tokens_ID[::-1] * 17
    arrivals = [Arrival(q, 500, q % 5) for q in range(50)]
    choose, same = (ROUTERS[name]().start(v, rng(7)) for v in (view, other))
    assert [choose(a) for a in arrivals] == [same(a) for a in arrivals]


@pytest.mark.parametrize("name", ROUTERS)
def test_a_decision_is_cheap(name):
    view = busy(2, 16, 16)
    choose = ROUTERS[name]().start(view, rng(1))
    arrivals = [Arrival(q % 50, 500, q) for q in range(200)]
    best_s = np.inf
    for _ in range(5):
        start_s = perf_counter()
        for arrival in arrivals:
            choose(arrival)
        best_s = min(best_s, (perf_counter() - start_s) / len(arrivals))
    assert best_s < 100e-6  # about 10 us on one core that nobody else uses


def run(name, view, numbers, **fields):
    choose = ROUTERS[name]().start(view, rng(0))
    return [divmod(choose(Arrival(n, 100, **fields)), view.waiting_ID.shape[1]) for n in numbers]


def test_round_robin_goes_over_instances_first_and_on_after_one_was_down():
    view = fleet()
    assert run("round_robin", view, range(7)) == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 0)]
    view.up_I[1] = False
    assert run("round_robin", view, range(4)) == [(0, 0), (2, 0), (0, 1), (2, 1)]


def test_loads():
    view = fleet(3, 1)
    view.waiting_ID[:, 0], view.running_ID[:, 0] = [1, 0, 0], [0, 3, 5]
    view.waiting_tokens_ID[:, 0], view.kv_tokens_ID[:, 0] = [900, 0, 0], [0, 700, 600]
    view.work_tokens_ID[:, 0] = [5, 4, 9]
    assert run("least_loaded", view, [0]) == [(0, 0)]
    assert run("vllm_load", view, [0]) == [(1, 0)]  # 4, 3, 5
    assert run("least_tokens", view, [0]) == [(2, 0)]
    assert run("shortest_queue", view, [0]) == [(1, 0)]
    assert run("oracle_least_work", view, [0]) == [(1, 0)]


def test_two_choices_keep_the_longest_queue_far_shorter_than_one_choice():
    longest = {}
    for name in ("random", "power_of_two_choices"):
        view = fleet(64, 1)
        choose = ROUTERS[name]().start(view, rng(5))
        for q in range(64 * 20):
            view.waiting_ID.flat[choose(Arrival(q, 1))] += 1
        longest[name] = view.waiting_ID.max() - 20
    assert longest["power_of_two_choices"] <= 4 < longest["random"]


def test_two_choices_never_take_the_fullest():
    view = fleet(3, 1)
    view.running_ID[:, 0] = [1, 9, 1]
    assert Counter(i for i, _ in run("power_of_two_choices", view, range(300))).keys() == {0, 2}


def test_prefix_aware_follows_the_cache_until_loads_are_apart():
    view = fleet(3, 1)
    view.cached_tokens = lambda request: np.array([[0], [60], [50]])
    view.running_ID[:, 0] = [0, 32, 1]
    assert run("prefix_aware", view, [0]) == [(1, 0)]  # 60 of 100 is above half
    view.running_ID[1, 0] = 33
    assert run("prefix_aware", view, [0]) == [(0, 0)]  # 33 apart is above 32
    choose = PrefixAware(cache_threshold=0.6).start(fleet(3, 1), rng(0))
    assert choose(Arrival(0, 100)) == 0
    view.running_ID[1, 0] = 1
    assert PrefixAware(cache_threshold=0.6).start(view, rng(0))(Arrival(0, 100)) == 0  # 60 is not above 60
    assert PrefixAware(balance_rel_threshold=2.0).start(view, rng(0))(Arrival(0, 100)) == 1


def test_kv_aware_weighs_prefill_against_what_is_held():
    view = fleet(2, 1)
    view.cached_tokens = lambda request: np.array([[80], [0]])
    view.kv_tokens_ID[:, 0] = [100, 0]
    assert KvAware().start(view, rng(0))(Arrival(0, 100)) == 1  # 20 + 100 against 100 + 0
    assert KvAware(overlap_weight=2.0).start(view, rng(0))(Arrival(0, 100)) == 0  # 140 against 200
    view.waiting_tokens_ID[0, 0] = 200
    assert KvAware(overlap_weight=2.0).start(view, rng(0))(Arrival(0, 100)) == 1


def test_expert_aware_takes_each_rank_once_a_round_and_the_best_that_is_left():
    view = fleet(1, 3)
    home_LE = np.array([[0, 0, 1, 2], [2, 1, 0, 0]])
    load_LE = np.array([[5.0, 0, 1, 0], [0, 0, 2, 0]])
    assert expert_votes(load_LE, home_LE, 3).tolist() == [7.0, 1.0, 0.0]
    view.votes = lambda request: expert_votes(load_LE, home_LE, 3)[None]
    assert run("expert_aware", view, range(6)) == [(0, 0), (0, 1), (0, 2)] * 2
    view.votes = None
    assert run("expert_aware", view, range(4)) == [(0, 0), (0, 1), (0, 2), (0, 0)]


def test_expert_aware_keeps_counts_equal_whatever_the_votes():
    view = busy(9, 2, 4)
    counts = Counter(run("expert_aware", view, [q % 50 for q in range(80)]))
    assert set(counts.values()) == {10}


def test_session_affinity_moves_only_topics_of_what_went_down():
    view = fleet(4, 2)
    where = {topic: run("session_affinity", view, [0, 1, 2], topic=topic) for topic in range(400)}
    assert all(len(set(places)) == 1 for places in where.values())
    spread = Counter(places[0] for places in where.values())
    assert len(spread) == 8 and max(spread.values()) < 100  # 50 each in the mean
    view.up_I[2] = False
    for topic, places in where.items():
        moved = run("session_affinity", view, [0], topic=topic)[0]
        assert moved == places[0] or places[0][0] == 2


def test_faults_of_a_fleet():
    assert ServingFault("down", 1, 10.0, 5.0).mistakes(2, 8) == []
    assert ServingFault("slow", 0, 0.0, float("inf"), rank=7, factor=2.0).mistakes(2, 8) == []
    found = ServingFault("sick", 2, -1.0, 0.0).mistakes(2, 8)
    assert [any(word in line for line in found) for word in ("kind", "instance 2", "start_s", "duration_s")] == [
        True
    ] * 4
    assert len(ServingFault("slow", 0, 0.0, 1.0, rank=8).mistakes(2, 8)) == 2
    assert len(ServingFault("down", 0, 0.0, 1.0, factor=2.0).mistakes(2, 8)) == 1
    first, again = ServingFault("down", 1, 10.0, 5.0), ServingFault("down", 1, 14.0, 5.0)
    assert overlapping([again, first]) and not overlapping([first, ServingFault("down", 1, 15.0, 5.0)])
