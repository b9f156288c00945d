"""Runs of a whole fleet: what holds in every one, and what each part of it changes."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from serving_cases import small_service

from moesim.faults import ServingFault
from moesim.fleet import Fleet
from moesim.policies.autoscaler import Autoscaling
from moesim.policies.router import ROUTERS
from moesim.serving.metrics import littles_law_ratio
from moesim.simulate.serving import simulate_service

BASE = small_service(rate_per_s=400.0, num=400)
ONE = replace(BASE, engine=replace(BASE.engine, tensor_parallel_size=1))
APART = Fleet(num_prefill_instances=2, num_decode_instances=2)


def with_requests(service, **changed):
    return replace(service, requests=replace(service.requests, **changed))


def with_engine(service, **changed):
    return replace(service, engine=replace(service.engine, **changed))


def with_fleet(service, fleet=None, **changed):
    return replace(service, fleet=replace(fleet or service.fleet, **changed))


def down(instance, start_s, duration_s=0.3):
    return ServingFault("down", instance, start_s, duration_s)


SPREAD = with_engine(BASE, tensor_parallel_size=1, data_parallel_size=4, enable_expert_parallel=True)
SCALED = Autoscaling("target_utilisation", 1, 4, interval_s=0.1, target=0.01, stabilisation_s=0.3, startup_s=0.05)
SERVICES = {
    "one": BASE,
    "four": ONE,
    "closed loop": with_requests(ONE, concurrency=30),
    "clients that think": with_requests(ONE, concurrency=30, think_s=0.02),
    "pipeline": with_engine(BASE, tensor_parallel_size=1, pipeline_parallel_size=4),
    "sglang": with_engine(BASE, scheduler="sglang"),
    "small cache": with_engine(ONE, num_gpu_blocks_override=140),
    "swapping": with_engine(ONE, num_gpu_blocks_override=140, preemption_mode="swap", swap_space_gib=1.0),
    "drafts": with_engine(ONE, num_speculative_tokens=3, acceptance_length=2.5),
    "apart": with_fleet(ONE, APART),
    "apart, at once": with_fleet(ONE, APART, overlaps_transfer=False),
    "apart, closed loop": with_requests(with_fleet(ONE, APART), concurrency=30),
    "spread": SPREAD,
    "spread, moving": with_engine(SPREAD, enable_eplb=True, num_redundant_experts=4, eplb_step_interval=100),
    "spread, memoised": with_engine(SPREAD, routing="memoised"),
    "one down": with_fleet(ONE, faults=(down(0, 0.2),)),
    "all down": with_fleet(ONE, num_instances=1, faults=(down(0, 0.2),)),
    "prefill down": with_fleet(ONE, APART, faults=(down(0, 0.2), down(1, 0.4))),
    "decode down": with_fleet(ONE, APART, faults=(down(2, 0.2), down(3, 0.3))),
    "slow": with_fleet(ONE, faults=(ServingFault("slow", 0, 0.2, 0.5, 0, 3.0),)),
    "scaled": with_fleet(ONE, num_instances=1, autoscaling=SCALED),
}


@pytest.mark.parametrize("name", SERVICES)
def test_everybody_is_answered_in_order_and_littles_law_holds(name):
    service = SERVICES[name]
    outcome = simulate_service(service)
    assert np.isfinite(outcome.finish_s_Q).all()
    np.testing.assert_array_equal(outcome.generated_Q, service.requests.output_Q)
    assert (outcome.arrival_s_Q <= outcome.scheduled_s_Q).all()
    assert (outcome.scheduled_s_Q < outcome.first_token_s_Q).all()
    assert (outcome.first_token_s_Q <= outcome.finish_s_Q).all()
    assert littles_law_ratio(outcome) == pytest.approx(1.0, rel=1e-9)
    assert outcome.timeline["kv_fraction"].max() <= 1.0
    if name != "drafts":
        assert outcome.itl_counts.sum() == (service.requests.output_Q - 1).sum()
    stages = service.engine.pipeline_parallel_size
    assert sum(outcome.parts_s.values()) == pytest.approx(outcome.busy_s * stages)


def _bytes(outcome):
    arrays = [value for value in vars(outcome).values() if isinstance(value, np.ndarray)]
    return b"".join(array.tobytes() for array in [*arrays, *outcome.timeline.values()])


@pytest.mark.parametrize("name", ["four", "apart", "spread, moving", "all down", "scaled", "closed loop"])
def test_the_same_seed_gives_the_same_bytes(name):
    assert _bytes(simulate_service(SERVICES[name])) == _bytes(simulate_service(SERVICES[name]))


def test_another_seed_routes_otherwise():
    service = with_fleet(SERVICES["four"], router="random")
    assert _bytes(simulate_service(service)) != _bytes(simulate_service(replace(service, seed=1)))


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_gets_everybody_answered(router):
    outcome = simulate_service(with_fleet(ONE, router=router))
    assert np.isfinite(outcome.finish_s_Q).all()
    assert len(np.unique(outcome.instance_Q)) == 4


def test_a_router_that_looks_does_better_than_one_that_does_not():
    heavy = replace(small_service(rate_per_s=30_000.0, num=2000), engine=ONE.engine)
    mean_s = {
        router: np.mean(outcome.finish_s_Q - outcome.arrival_s_Q)
        for router in ("random", "least_loaded", "oracle_least_work")
        for outcome in [simulate_service(with_fleet(heavy, router=router))]
    }
    assert mean_s["least_loaded"] < mean_s["random"]
    assert mean_s["oracle_least_work"] < mean_s["random"]


def test_what_instances_compute_apart_comes_over_the_links():
    at_once, layered = (simulate_service(SERVICES[name]) for name in ("apart, at once", "apart"))
    many = at_once.output_Q > 1
    assert set(at_once.instance_Q[many]) == {2, 3}  # who decoded it
    gap_s = [np.mean(o.worst_itl_s_Q[many]) for o in (at_once, layered)]
    assert gap_s[0] > gap_s[1]  # the cache is waited for between the first and the second token


def test_who_is_down_answers_nobody_and_its_requests_begin_anew():
    outcome = simulate_service(SERVICES["all down"])
    quiet = (outcome.finish_s_Q > 0.2) & (outcome.finish_s_Q < 0.5)
    assert not quiet.any()
    assert (outcome.arrival_s_Q[quiet] < 0.5).all()
    assert outcome.timeline["instances"].min() == 0


def test_a_fleet_that_never_comes_back_says_so():
    outcome = simulate_service(with_fleet(ONE, num_instances=1, faults=(down(0, 0.2, np.inf),)))
    left = np.isnan(outcome.finish_s_Q).sum()
    assert left > 0
    assert any(f"no instance came back for {left} requests" in note for note in outcome.notes)
    assert littles_law_ratio(outcome) == pytest.approx(1.0, rel=1e-9)


def test_a_slow_rank_makes_its_instance_slow_and_only_then():
    slow, sound = (simulate_service(SERVICES[name]) for name in ("slow", "four"))
    before = sound.finish_s_Q < 0.2
    np.testing.assert_array_equal(slow.finish_s_Q[before], sound.finish_s_Q[before])
    assert slow.busy_s > sound.busy_s


def test_autoscaling_brings_instances_when_they_are_needed_and_gives_them_back():
    outcome = simulate_service(SERVICES["scaled"])
    up = outcome.timeline["instances"]
    assert up[0] == 1
    assert up.max() > 1.5
    assert outcome.seconds < outcome.device_s < 4 * outcome.seconds


def test_experts_that_move_lower_the_imbalance():
    skewed = {
        eplb: simulate_service(
            with_engine(SPREAD, enable_eplb=eplb, num_redundant_experts=4, eplb_step_interval=50, eplb_window_size=50)
        )
        for eplb in (False, True)
    }
    worst = {eplb: np.nanmean(outcome.timeline["imbalance"]) for eplb, outcome in skewed.items()}
    assert worst[True] < worst[False]
    assert any("experts moved" in note for note in skewed[True].notes)


def test_what_never_fits_is_refused():
    prompt_Q = ONE.requests.prompt_Q.copy()
    prompt_Q[3] = 1_000_000
    service = with_requests(with_engine(ONE, num_gpu_blocks_override=200), prompt_Q=prompt_Q)
    outcome = simulate_service(service)
    assert np.flatnonzero(outcome.dropped_Q).tolist() == [3]
    assert np.isfinite(np.delete(outcome.finish_s_Q, 3)).all()


LONG = """
name = "long"
model = "olmoe-1b-7b"
hardware = "hgx-h100"
trace = "olmoe-shape-16x64"
[requests]
arrivals = "poisson"
rate_per_s = 50.0
num_requests = 2000000
prompt_tokens = 100
output_tokens = 200
"""


def test_ctrl_c_leaves_a_partial_result_that_says_so(tmp_path):
    (tmp_path / "long.toml").write_text(LONG)
    simulate_service(ONE)  # compiled
    command = [sys.executable, "-m", "moesim", "run", str(tmp_path / "long.toml"), "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # it is ignored in background jobs
    with subprocess.Popen(command, **pipes) as run:
        try:
            time.sleep(15)
            run.send_signal(signal.SIGINT)
            out, err = run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 130, err
    shape = json.loads(out)
    assert shape["is_partial"]
    assert 0 < shape["metrics"]["num_finished"] < 2_000_000
    assert shape["metrics"]["littles_law_ratio"] == pytest.approx(1.0, rel=1e-6)
    assert any("PARTIAL" in warning for warning in shape["warnings"])


@pytest.mark.parametrize(
    ("name", "changed"), [("spread, memoised", {}), ("spread, memoised", {"num_gpu_blocks_override": 140})]
)
def test_iterations_that_are_alike_may_be_played_as_one(monkeypatch, name, changed):
    service = with_engine(SERVICES[name], **changed)
    leaping = simulate_service(service)
    monkeypatch.setattr("moesim.serving.instance.LEAP", 1)
    walking = simulate_service(service)
    np.testing.assert_array_equal(leaping.generated_Q, walking.generated_Q)
    assert leaping.itl_counts.sum() == walking.itl_counts.sum()
    assert leaping.num_iterations == pytest.approx(walking.num_iterations, rel=0.02)
    assert leaping.busy_s == pytest.approx(walking.busy_s, rel=0.02)
    for part, seconds in walking.parts_s.items():
        assert leaping.parts_s[part] == pytest.approx(seconds, rel=0.03, abs=1e-9)
    mean_s = [np.mean(o.finish_s_Q - o.arrival_s_Q) for o in (leaping, walking)]
    assert mean_s[0] == pytest.approx(mean_s[1], rel=0.01)
