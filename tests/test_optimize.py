"""Placement: every method keeps the contract, every bound holds against all placements of small problems."""

import itertools
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from moesim.cli import cli
from moesim.files.placements import placement_csv, placement_json, read_placement
from moesim.layout import Placement
from moesim.optimize.balance import copies_of
from moesim.optimize.bounds import least_left, least_load_L, least_spread, pair_load_L
from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.methods import METHODS
from moesim.optimize.methods.exflow import ExFlow
from moesim.optimize.methods.moetuner import MoeTuner
from moesim.optimize.place import method_mistakes, place
from moesim.optimize.problem import Problem, Weights
from moesim.optimize.prover import proved_load_L
from moesim.optimize.score import left_fraction, rank_load_SLR, scored, spread_fraction
from moesim.optimize.search import Caps, _State, annealed, most_even
from moesim.policies.placement import Eplb
from moesim.routing.synthetic import topic_trace

SHORT = {"exflow": ExFlow(limit_s=1.0), "moetuner": MoeTuner(limit_s=0.5)}


def demand(num_layers: int, num_experts: int, top_k: int, tokens_per_step: int = 64, **given) -> Demand:
    given = {"num_topics": 4, "concentration": 0.2, "num_requests": 32, "tokens": 16} | given
    return Demand.of(topic_trace(num_layers, num_experts, top_k, **given), tokens_per_step=tokens_per_step)


def full(problem: Problem, slot_LP: np.ndarray, load_LE: np.ndarray) -> np.ndarray:
    """Load of the fullest rank of each layer, over its speed."""
    return (rank_load_SLR(problem, slot_LP, load_LE[None])[0] / problem.speed_R).max(axis=1)


EVEN = Problem.even(16, 4, 2)
COPIES = Problem.even(16, 4, 2, 8)
UNEVEN = replace(COPIES, slots_R=np.array([8, 6, 6, 3], np.int32), speed_R=np.array([1.0, 1.0, 0.5, 0.4]))


@pytest.mark.parametrize("problem", [EVEN, COPIES, UNEVEN], ids=["even", "copies", "uneven"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_the_contract(name, problem):
    asked = replace(problem, weights=Weights(load=0.1, steps=0.1, node=1.0))
    method, wanted = SHORT.get(name, METHODS[name]), demand(3, 16, 4)
    if method_mistakes(name, method, asked, wanted):
        with pytest.raises(ValueError, match=f"method '{name}'"):
            place(asked, wanted, method=name)
        return
    slot_LP = method.place(asked, wanted, Clock(60))
    assert slot_LP.shape == (3, asked.num_slots)
    assert slot_LP.dtype == np.int32
    assert (asked.counts(slot_LP) >= 1).all()  # raises where an expert has no slot
    again = method.place(asked, wanted, Clock(60))
    if name not in SHORT and name != "polished":  # programmes with a time limit may differ
        np.testing.assert_array_equal(slot_LP, again)


def every_placement(problem: Problem, num_experts: int) -> list[np.ndarray]:
    """All contents of the slots of one layer, those of a rank in order."""
    found = set()
    spare = problem.num_slots - num_experts
    for extra in itertools.combinations_with_replacement(range(num_experts), spare):
        for order in set(itertools.permutations([*range(num_experts), *extra])):
            ranks = np.split(np.array(order), problem.first_R[1:-1])
            found.add(tuple(e for rank in ranks for e in sorted(rank.tolist())))
    return [np.array(slots, np.int32) for slots in sorted(found)]


@pytest.mark.parametrize(("experts", "ranks", "spare"), [(6, 3, 0), (6, 2, 0), (4, 3, 2), (5, 3, 1), (3, 4, 5)])
def test_bounds_of_load_hold_against_all_placements(experts, ranks, spare):
    problem, rng = Problem.even(experts, ranks, ranks, spare), np.random.default_rng(experts * ranks)
    all_of = every_placement(problem, experts)
    for _ in range(6):
        load_LE = np.exp(rng.normal(0, 1, (1, experts)))
        best = min(full(problem, slots[None], load_LE)[0] for slots in all_of)
        assert least_load_L(problem, load_LE)[0] <= best * (1 + 1e-9)
        bound_L, even_LP = pair_load_L(problem, load_LE), most_even(problem, load_LE)
        assert bound_L[0] <= best * (1 + 1e-9)
        assert full(problem, even_LP, load_LE)[0] <= best * 1.1
        assert proved_load_L(problem, load_LE, bound_L, even_LP, Clock(20))[0] == pytest.approx(best, rel=1.1e-3)
        if problem.slots_R[0] == 2:
            assert bound_L[0] == pytest.approx(best) == full(problem, even_LP, load_LE)[0]


def test_bounds_of_traffic_hold_against_all_placements():
    problem = Problem.even(6, 2, 1, weights=Weights(load=0.0, node=1.0))
    wanted = demand(2, 6, 2, num_topics=2)
    caps = Caps.of(problem, wanted.load_LE)
    bound = least_left(problem, wanted, "node", caps.share_L(problem, wanted.load_LE, "node"), Clock(), rounds=200)
    all_of = every_placement(problem, 6)
    allowed = [
        left_fraction(problem, both, wanted, "node")
        for pair in itertools.product(all_of, all_of)
        if not caps.exceeded_by(problem, both := np.array(pair), wanted.load_LE)
    ]
    assert 0 < bound.best <= min(allowed) + 1e-6
    assert bound.best >= max(bound.matching, bound.spectral)
    found = annealed(problem, wanted, Clock())
    assert left_fraction(problem, found, wanted, "node") <= min(allowed) + 0.02
    assert caps.exceeded_by(problem, found, wanted.load_LE) == 0
    one = replace(wanted, load_SLE=wanted.load_SLE[:, :1], together_LEE=wanted.together_LEE[:1])
    caps = Caps.of(problem, one.load_LE)
    least = least_spread(problem, one, caps.share_L(problem, one.load_LE, "node"), Clock(), rounds=200).best
    inside = [slots[None] for slots in all_of if not caps.exceeded_by(problem, slots[None], one.load_LE)]
    assert 0 < least <= min(spread_fraction(problem, slots, one) for slots in inside) + 1e-6


@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_what_annealing_says_it_gained_is_what_the_objective_lost(spread):
    problem = replace(
        UNEVEN, weights=Weights(load=0.3, steps=0.5, rank=0.2, node=1.0, spread=spread, moved=0.1),
        today=METHODS["shuffled"].place(UNEVEN, demand(3, 16, 4), Clock()), per_rack=4,
    )  # fmt: skip
    wanted = demand(3, 16, 4, tokens_per_step=128)
    slot_LP = most_even(problem, wanted.load_LE)
    before = scored(problem, slot_LP, wanted).objective(problem.weights)
    state = _State(problem, wanted, slot_LP.copy(), Caps.of(problem, wanted.load_LE))
    gained = sum(state.sweep(heat, 300) for heat in (0.01, 0.003, 0.0))
    after = scored(problem, state.slot_LP, wanted).objective(problem.weights)
    assert abs(gained) > 1e-3
    np.testing.assert_allclose(before - after, gained, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("experts", "ranks", "spare"), [(64, 8, 0), (64, 8, 8), (256, 144, 32), (128, 32, 32), (8, 8, 8)]
)
def test_most_even_is_never_worse_than_eplb_and_meets_what_can_be_met(experts, ranks, spare):
    problem = Problem.even(experts, ranks, ranks, spare)
    load_LE = np.exp(np.random.default_rng(1).normal(0, 0.6, (12, experts))) * 1000
    ours = full(problem, most_even(problem, load_LE), load_LE)
    theirs = full(problem, Eplb().place(problem.num_slots, ranks, ranks, load_LE).slot_expert_LP, load_LE)
    assert (ours <= theirs * (1 + 1e-9)).all()
    least_L = least_load_L(problem, load_LE)
    assert (ours >= least_L * (1 - 1e-9)).all()
    if problem.num_slots // ranks >= 8:
        assert (ours <= least_L * 1.002).all()


def test_copies_of_are_the_best_for_the_busiest_copy():
    load_E = np.array([9.0, 5.0, 2.0, 1.0])
    best = min(
        max(load_E / np.array(counts))
        for counts in itertools.product(range(1, 5), repeat=4)
        if sum(counts) == 7
    )  # fmt: skip
    assert (load_E / copies_of(load_E, 7)).max() == best


def test_steps_are_made_even_where_topics_take_turns():
    one, two = (demand(2, 32, 2, num_topics=1, concentration=0.3, seed=seed) for seed in (1, 2))
    both = replace(one, load_SLE=np.concatenate([one.load_SLE, two.load_SLE]))
    problem = Problem.even(32, 4, 4, weights=Weights(load=0.0, steps=1.0))
    placed = place(problem, both, both)
    assert placed.objective < 0.97 * placed.baselines["eplb"]
    assert placed.lower_bound <= placed.oracle_steps <= placed.objective + 1e-9


def test_infeasible_problems_say_why():
    few = replace(EVEN, slots_R=np.full(4, 3, np.int32))
    with pytest.raises(ValueError, match=r"16 experts need.*have 12, 4 too few; 1 more on each rank, or 2 more ranks"):
        place(few, demand(2, 16, 4))
    with pytest.raises(ValueError, match="3 redundant would do"):
        Problem.even(13, 4, 4, 1)
    with pytest.raises(ValueError, match="17 slots for 16 experts"):
        place(replace(EVEN, slots_R=np.array([17, 3, 3, 3], np.int32)), demand(2, 16, 4))
    with pytest.raises(ValueError, match="give a routing trace instead of counts"):
        place(replace(EVEN, weights=Weights(node=1.0)), Demand.of_load(np.ones((2, 16))))
    with pytest.raises(ValueError, match="unknown method 'eplbb'"):
        place(EVEN, demand(2, 16, 4), method="eplbb")


def test_a_time_limit_and_ctrl_c_return_the_best_so_far():
    problem, wanted = replace(EVEN, weights=Weights(load=0.0, node=1.0)), demand(3, 16, 4)
    placed = place(problem, wanted, clock=Clock(0.0))
    assert placed.cut_short == "time limit"
    assert placed.lower_bound <= placed.objective
    clock = Clock()
    with clock.asked_by_ctrl_c():
        os.kill(os.getpid(), signal.SIGINT)
        placed = place(problem, wanted, clock=clock)
    assert placed.cut_short == "interrupted"
    assert (problem.counts(placed.slot_LP) >= 1).all()


def test_maps_are_read_as_written(tmp_path):
    slot_LP = METHODS["shuffled"].place(UNEVEN, demand(3, 16, 4), Clock())
    placement = UNEVEN.as_placement(slot_LP)
    np.testing.assert_array_equal(UNEVEN.of_placement(placement), slot_LP)
    path = tmp_path / "map.json"
    path.write_text(placement_json(placement, 16))
    np.testing.assert_array_equal(read_placement(path, 4).slot_expert_LP, placement.slot_expert_LP)
    shape = json.loads(path.read_text())
    for layer, slots_EX in enumerate(shape["logical_to_physical_map"]):
        for expert, slots in enumerate(slots_EX):
            assert all(shape["physical_to_logical_map"][layer][slot] == expert for slot in slots if slot >= 0)
            assert sum(slot >= 0 for slot in slots) == shape["logical_replica_count"][layer][expert]
    rows = placement_csv(Placement(np.array([[1, 0], [0, 1]], np.int32), 2), 2).splitlines()
    assert rows == ["Expert,Node", "0,1", "1,0", "2,0", "3,1"]
    with pytest.raises(ValueError, match="use a map for 8"):
        read_placement(path, 8)
    path.write_text("{}")
    with pytest.raises(ValueError, match="physical_to_logical_map: is missing"):
        read_placement(path, 4)


SCENARIO = """
model = "olmoe-1b-7b"
hardware = "hgx-h100"
trace = "olmoe-shape-16x64"
[layout]
attention = { dp = 8 }
experts = { ep = 8 }
[workload]
num_requests = 64
output_tokens = 4
"""


def test_place_writes_a_map_that_a_run_takes(tmp_path):
    path, out, table = tmp_path / "s.toml", tmp_path / "map.json", tmp_path / "map.csv"
    path.write_text(SCENARIO)
    options = ["place", str(path), "--method", "eplb", "-o", str(out), "--csv", str(table), "--json"]
    said = CliRunner().invoke(cli, options, catch_exceptions=False)
    shape = json.loads(said.stdout)
    assert {"layers", "ranks", "objective", "lower_bound", "gap_fraction", "seconds", "baselines", "heldout"} <= set(
        shape
    )
    assert len(table.read_text().splitlines()) == 16 * 64 + 1
    run = ["run", str(path), "--engine", "estimate", "--json", "--set"]
    runs = [
        json.loads(CliRunner().invoke(cli, [*run, f"policies.placement={name}"], catch_exceptions=False).stdout)
        for name in (out, "eplb")
    ]
    assert runs[0]["metrics"] == runs[1]["metrics"]  # the same placement, the same requests held out
    found = CliRunner().invoke(cli, [*run, f"policies.placement={out}", "--set", "layout.num_redundant_experts=8"])
    assert "the map has 16 layers of 64 slots, the set-up 16 of 72" in str(found.exception)
