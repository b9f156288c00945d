"""Copies chosen at run time, time as a price, and placing anew as traffic drifts."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from moesim.cli import cli
from moesim.costs.migration import moving
from moesim.estimate import estimate
from moesim.files.scenarios import load_scenarios
from moesim.layout import Placement
from moesim.network.routes import Fabric
from moesim.optimize.choice import CHOICES, choices, least_loaded
from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.methods import METHODS
from moesim.optimize.of_scenario import halves, problem_of
from moesim.optimize.price import Price, price_of
from moesim.optimize.problem import Problem, Weights
from moesim.optimize.rebalance import Plan, Rebalancing, drifting, renumbered
from moesim.optimize.score import moved_fraction, rank_sums, scored
from moesim.optimize.search import most_even
from moesim.routing.synthetic import topic_trace
from moesim.routing.trace import RoutingTrace, joined

SCENARIO = """
name = "two-nodes"
model = "olmoe-1b-7b"
hardware = "2 x hgx-h100"
trace = "olmoe-shape-16x64"
engine = "estimate"
[layout]
attention = { dp = 16, tp = 1 }
experts = { ep = 16 }
num_redundant_experts = 16
[workload]
num_requests = 1024
prompt_tokens = 16
output_tokens = 5
"""
NEVER_SLOW = Price(even_s=1e-3, steps_s=0.0, spread_s=0.0, error=0.0)
OF_LOAD = Price(even_s=1e-3, steps_s=1e-3, spread_s=0.0, error=0.0)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "s.toml").write_text(SCENARIO)
    return tmp_path / "s.toml"


def drift(parts: int = 3, **given) -> list[RoutingTrace]:
    """Loads whose busy experts change from part to part."""
    return [
        topic_trace(3, 16, 2, num_topics=1, concentration=0.3, num_requests=32, tokens=16, seed=seed, **given)
        for seed in range(parts)
    ]


def test_least_loaded_copies_are_the_best_there_are():
    problem = replace(Problem.even(6, 4, 2, 2), speed_R=np.array([1.0, 0.5, 1.0, 1.0]))
    rng = np.random.default_rng(0)
    for _ in range(5):
        load_SLE = rng.exponential(100, (3, 2, 6))
        slot_LP = most_even(problem, load_SLE.sum(axis=0))
        rank_SLR = rank_sums(problem, least_loaded(problem, slot_LP, load_SLE))
        for step, layer in np.ndindex(3, 2):
            held = [set(problem.rank_P[slot_LP[layer] == e].tolist()) for e in range(6)]
            most = max(  # what only some ranks can compute, over what these compute in a second
                sum(load_SLE[step, layer, e] for e in range(6) if held[e] <= set(ranks))
                / sum(problem.speed_R[r] for r in ranks)
                for size in range(1, 5)
                for ranks in itertools.combinations(range(4), size)
            )
            assert (rank_SLR[step, layer] / problem.speed_R).max() == pytest.approx(most)


def test_choices_keep_all_tokens_and_do_what_they_say():
    problem = Problem.even(16, 8, 4, 16)
    wanted = Demand.of(topic_trace(3, 16, 4, num_topics=4, concentration=0.2, num_requests=64, tokens=16), None, 128)
    slot_LP = most_even(problem, wanted.load_LE)
    for choose in CHOICES.values():
        load_SLP = choose(problem, slot_LP, wanted.load_SLE)
        for layer, slot_P in enumerate(slot_LP):
            back_SE = load_SLP[:, layer] @ (slot_P[:, None] == np.arange(16))
            np.testing.assert_allclose(back_SE, wanted.load_SLE[:, layer])
    found = choices(problem, slot_LP, wanted)
    assert found["least loaded"].steps < found["in turn"].steps <= found["at random"].steps
    assert found["nearest"].away < found["in turn"].away == 0.5
    assert found["in turn"].steps == pytest.approx(scored(problem, slot_LP, wanted).steps)


def test_the_price_is_the_simulators_on_placements_that_it_was_not_made_by(path):
    base = load_scenarios(path)[0]
    problem, (known, others) = problem_of(base), halves(base)
    price = price_of(base, problem, known)
    assert price.error < 0.05
    wanted = Demand.of(others.take(others.is_decode_T), None, base.workload.num_requests)
    seconds = {}
    for name in ("contiguous", "anticorrelated", "hecate"):
        slot_LP = METHODS[name].place(problem, Demand.of(known), Clock())
        seconds[name] = estimate(replace(base, placement=problem.as_placement(slot_LP))).metrics["tpot_s"]
        assert price.seconds(scored(problem, slot_LP, wanted)) == pytest.approx(seconds[name], rel=0.05)
    assert max(seconds.values()) > 1.1 * min(seconds.values())  # or the price would be right whatever it said


def test_a_price_of_nothing_cannot_be_weighed():
    with pytest.raises(ValueError, match="as long wherever experts lie"):
        _ = NEVER_SLOW.weights


def test_moving_an_expert_takes_its_bytes_over_the_link(path):
    base = load_scenarios(path)[0]
    model, fabric = base.model, Fabric(base.cluster)
    before = Placement(np.arange(64, dtype=np.int32)[None], 16)
    after = Placement(before.slot_expert_LP.copy(), 16)
    assert moving(before, after, model, fabric) == (0, 0.0)
    after.slot_expert_LP[0, [0, 4]] = [4, 0]  # ranks 0 and 1 of one node
    near = moving(before, after, model, fabric)
    after.slot_expert_LP[:] = before.slot_expert_LP
    after.slot_expert_LP[0, [0, 32]] = [32, 0]  # another node
    far = moving(before, after, model, fabric)
    size = 2 * model.experts.expert_params(model.hidden_size, model.experts.expert_widths[0])
    assert near[0] == far[0] == 2
    assert 450e9 * near[1] > size  # NVLink's 450 GB/s each way, less what is not reached
    assert 450e9 * near[1] < 2 * size
    assert far[1] > 5 * near[1]


def test_renumbering_keeps_the_most_in_place():
    problem, rng = replace(Problem.even(12, 4, 2), speed_R=np.array([1.0, 1.0, 0.5, 1.0])), np.random.default_rng(0)
    for _ in range(10):
        old_P, new_P = rng.permutation(12).astype(np.int32), rng.permutation(12).astype(np.int32)
        found_P = renumbered(problem, new_P[None], old_P[None])[0]
        contents = [set(ranks.tolist()) for ranks in found_P.reshape(4, 3)]
        assert contents[2] == set(new_P[6:9].tolist())  # the slow one stays
        kept = [
            sum(len(set(new_P.reshape(4, 3)[a].tolist()) & set(old_P.reshape(4, 3)[b].tolist())) for a, b in pairs)
            for order in itertools.permutations([0, 1, 3])
            for pairs in [[*zip(order, [0, 1, 3], strict=True), (2, 2)]]
        ]
        assert sum(len(a & set(b.tolist())) for a, b in zip(contents, old_P.reshape(4, 3), strict=True)) == max(kept)


def test_placing_anew_follows_the_drift_where_that_pays(path):
    base = load_scenarios(path)[0]
    trace = joined(drift())
    load_KLE = drifting(trace, 256, ticks=240, around=1.0, width=0.05)
    assert (load_KLE.sum(axis=2) == 512).all()
    problem = Problem.even(16, 8, 8, 8)
    ours = Plan("ours", ("repaired", "swaps"), every_s=60.0, window_s=60.0, worth=1.0, matched=True)
    study = Rebalancing(problem, OF_LOAD, base.model, base.cluster, load_KLE, 10.0)
    never, eplb, best = (study.run(plan) for plan in (Plan("never"), Plan("EPLB", ("eplb",)), ours))
    oracle = study.oracle()
    assert never.moved == 0 == len(never.moved_at_s)
    assert oracle.iteration_s < best.iteration_s < 0.95 * eplb.iteration_s
    assert best.iteration_s < 0.95 * never.iteration_s
    assert 0 < best.stalled < 0.01
    assert eplb.moved_at_s == [600.0, 1200.0]
    # where the fullest rank costs nothing, or moving would cost too much, nothing moves
    study = Rebalancing(problem, NEVER_SLOW, base.model, base.cluster, load_KLE, 10.0)
    assert study.run(ours).moved == 0
    study = Rebalancing(problem, OF_LOAD, base.model, base.cluster, load_KLE, 10.0)
    assert study.run(replace(ours, worth=1e9)).moved == 0


def test_repairing_moves_fewer_than_placing_anew():
    problem, parts = Problem.even(16, 8, 8, 8), [Demand.of(part) for part in drift(2)]
    today = most_even(problem, parts[0].load_LE)
    mixed = Demand.of_load(parts[0].load_LE + 0.2 * parts[1].load_LE)
    asked = replace(problem, today=today, weights=Weights(load=1.0, moved=0.01))
    repaired = METHODS["repaired"].place(asked, mixed, Clock())
    assert scored(problem, repaired, mixed).load < scored(problem, today, mixed).load
    assert moved_fraction(problem, repaired, today) < moved_fraction(problem, most_even(problem, mixed.load_LE), today)


def test_rebalance_command(path, tmp_path):
    given = ["rebalance", str(path), "--hours", "0.5", "--tick-s", "30", "--json", "--plot", str(tmp_path / "p.svg")]
    said = CliRunner().invoke(cli, [*given, "--worth", "1", "--worth", "1e9"], catch_exceptions=False)
    plans = json.loads(said.stdout)["plans"]
    assert [plan["name"] for plan in plans][:3] == ["never", "EPLB", "Hecate"]
    assert plans[-1]["iteration_s"] <= min(plan["iteration_s"] for plan in plans)
    assert plans[-2]["num_experts_moved"] == 0
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    for given, says in ((["--hours", "0"], "--hours 0: must be above 0"), (["--plot", "/no/such/p.svg"], "/no/such")):
        found = CliRunner().invoke(cli, ["rebalance", str(path), *given])
        assert says in str(found.exception)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--rank", "99:speed=1"], "there is no rank 99; 0 to 15 would do"),
        (["--rank", "1:speed"], "as in 3:speed=0.5,slots=4"),
        (["--rank", "1:memory=3"], "unknown memory; speed and slots would do"),
        (["--rank", "1:slots=70"], "a rank has 70 slots for 64 experts"),
        (["--rank", "1:slots=60", "--set", "workload.prompt_tokens=9300"], "GiB are free; "),
        (["--rank", "1:speed=0"], "needs a speed above 0"),
        (["--rank", "1:speed=0.5", "--weights", "time"], "give slow ranks as [faults]"),
    ],
)
def test_unlike_ranks_are_checked(path, given, says):
    found = CliRunner().invoke(cli, ["place", str(path), *given])
    assert says in str(found.exception)


def test_unlike_ranks_get_what_they_can_do(path, tmp_path):
    out = tmp_path / "map.json"
    given = ["place", str(path), "--rank", "3:speed=0.5", "--rank", "5:slots=1", "-o", str(out), "--json"]
    shape = json.loads(CliRunner().invoke(cli, given, catch_exceptions=False).stdout)
    assert shape["slots"] == 76
    slots = np.array(json.loads(out.read_text())["physical_to_logical_map"]).reshape(16, 16, 5)
    assert ((slots >= 0).sum(axis=2) == [5, 5, 5, 5, 5, 1, *[5] * 10]).all()


def test_time_is_an_objective(path):
    given = ["place", str(path), "--weights", "time", "--json", "--bound-limit-s", "1"]
    shape = json.loads(CliRunner().invoke(cli, given, catch_exceptions=False).stdout)
    assert shape["simulated_tpot_s"]["annealed"] < 0.99 * shape["simulated_tpot_s"]["contiguous"]
    assert shape["price"]["steps_s"] > 0
    assert set(shape["replica_choices"]) == set(CHOICES)
