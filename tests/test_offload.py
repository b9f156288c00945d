"""Experts that do not fit: the clock, the published examples, and what holds for every policy of each kind."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import small_scenario
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.estimate import estimate
from moesim.files.hardware import load_device
from moesim.files.models import load_model
from moesim.offload.hits import hit_rates_C
from moesim.offload.replay import PolicySet, UnitTimes, replay
from moesim.offload.run import OffloadedRun
from moesim.offload.store import ExpertStore, HostLevel
from moesim.offload.timeline import Task, Timeline
from moesim.policies import SYSTEMS
from moesim.policies.cache import CACHES, SlotsByLoads
from moesim.policies.executor import (
    CPU,
    EXECUTORS,
    GPU,
    NEAR,
    BitPlanes,
    CPUOnly,
    HotCold,
    Work,
    look_up,
    savings,
    schedule,
)
from moesim.policies.grouping import GROUPINGS, LongestQueue, Regrouped
from moesim.policies.predictor import PREDICTORS, Oracle, OracleStated
from moesim.policies.prefetch import PREFETCHERS, WholePathAhead
from moesim.policies.view import View
from moesim.program.iterations import Iterations
from moesim.routing.reuse import belady_hits_LC, lru_hits_LC
from moesim.routing.synthetic import sticky_trace, zipf_trace
from moesim.simulate import simulate

REPLAYED = [name for name, policies in SYSTEMS.items() if "batching" not in policies]
few = settings(max_examples=15, deadline=None)


def offloaded(fraction=0.5, seed=0, requests=1, outputs=12, heads=8, **policies):
    return small_scenario(
        per_node=1, spread=False, fraction=fraction, seed=seed, requests=requests, outputs=outputs, layers=4,
        heads=heads, policies=policies,
    )  # fmt: skip


def played(scenario):
    iterations = Iterations(scenario)
    run = OffloadedRun(iterations)
    return run, [run.play(iteration) for iteration in iterations]


# The clock


def test_a_unit_takes_one_task_at_a_time_in_the_order_of_priority():
    clock = Timeline()
    first, later, urgent = (Task(n, "gpu", 2.0, priority) for n, priority in (("a", 1), ("b", 1), ("c", 0)))
    other = Task("d", "cpu", 1.0)
    for task in (first, later, urgent, other):
        clock.submit(task)
    clock.drain()
    assert [first.finish_s, urgent.finish_s, later.finish_s, other.finish_s] == [2, 4, 6, 1]
    assert clock.busy_s == {"gpu": 6.0, "cpu": 1.0}


def test_a_task_waits_for_others_and_for_nobody_that_is_done():
    clock = Timeline()
    copy = clock.submit(Task("copy", "link", 3.0))
    run = clock.submit(Task("run", "gpu", 1.0), [copy])
    assert clock.run([run]) == 4.0
    assert clock.submit(Task("again", "gpu", 1.0), [copy, run]).start_s == 4.0
    with pytest.raises(RuntimeError, match="never submitted"):
        clock.run([clock.submit(Task("stuck", "gpu", 1.0), [Task("lost", "gpu", 1.0)])])


def test_readers_of_one_memory_slow_each_other_down_fairly():
    """10 bytes a second: the link wants 6, the CPU 8; each gets 5 until the CPU is done."""
    clock = Timeline({"dram": 10.0})
    link = clock.submit(Task("copy", "link", 10.0, memory="dram", demand=6.0))
    cpu = clock.submit(Task("experts", "cpu", 5.0, memory="dram", demand=8.0))
    clock.drain()
    assert cpu.finish_s == pytest.approx(8.0)  # 40 bytes at 5
    assert link.finish_s == pytest.approx(8 + 20 / 6)  # 40 of its 60 bytes were moved by then
    small = clock.submit(Task("copy", "link", 1.0, memory="dram", demand=2.0))
    large = clock.submit(Task("experts", "cpu", 1.0, memory="dram", demand=16.0))
    begun = clock.now_s
    clock.drain()
    assert small.finish_s - begun == pytest.approx(1.0)  # less than its share: not slowed down
    assert large.finish_s - begun == pytest.approx(1 + (16 - 8) / 10)


def test_an_urgent_copy_waits_for_the_piece_that_is_on_its_way():
    clock = Timeline()
    early = clock.submit(Task("prefetch", "link", 8.0, 1.0, piece_s=2.0))
    gpu = clock.submit(Task("router", "gpu", 3.0))
    clock.run([gpu])
    urgent = clock.submit(Task("miss", "link", 1.0, 0.0))
    clock.drain()
    assert (urgent.start_s, urgent.finish_s, early.finish_s) == (4.0, 5.0, 9.0)
    whole = clock.submit(Task("prefetch", "link", 8.0, 1.0))
    after = clock.submit(Task("miss", "link", 1.0, 0.0))
    clock.drain()
    assert after.start_s == whole.finish_s, "what has no pieces is not interrupted"


def test_what_waits_can_be_urged_and_withdrawn():
    clock = Timeline()
    clock.submit(Task("now", "link", 1.0))
    a, b, c = (clock.submit(Task(n, "link", 1.0, 5.0)) for n in "abc")
    clock.urge(c, 0.0)
    assert clock.withdraw("link", lambda task: task is not a) == [a]
    clock.drain()
    assert (c.finish_s, b.finish_s) == (2.0, 3.0) and a.start_s == np.inf


# Published examples


def work(here_gpu, here_cpu, away_cpu, copy_s, gpu_free_s=0.0):
    """Experts on the device with their seconds on both units, then missing ones (1 on the GPU), most tokens first."""
    is_here_N = np.array([True] * len(here_gpu) + [False] * len(away_cpu))
    gpu_N = np.array([*here_gpu, *[1.0] * len(away_cpu)])
    return is_here_N, gpu_N, np.array([*here_cpu, *away_cpu], float), copy_s, 0.0, gpu_free_s, 0.0, 0.0


def test_hybrimoe_figure_5():
    """Shared expert on the GPU; D (4 tokens), E (1) there; A, B (1), C (3) missing; a copy takes 3."""
    unit_N, copied_N, seconds = schedule(*work([1.0, 1.0], [4.0, 1.0], [3.0, 1.0, 1.0], 3.0, gpu_free_s=1.0))
    assert seconds == 4.0
    assert unit_N[2] == GPU and copied_N[2] == 0.0, "C is copied and runs on the GPU"
    assert unit_N[0] == GPU and unit_N[3] == unit_N[4] == CPU and np.isinf(copied_N[[0, 1, 3, 4]]).all()


@few
@given(st.data())
def test_the_play_ahead_is_never_longer_than_without_help(data):
    n, m = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 4))
    times = st.floats(0.1, 9.0)
    here, away = ([data.draw(times) for _ in range(k)] for k in (n, m))
    args = work([1.0] * n, here, sorted(away, reverse=True), data.draw(times))
    unit_N, copied_N, seconds = schedule(*args)
    assert (unit_N >= 0).all() and (np.isinf(copied_N) | (unit_N == GPU)).all()
    assert seconds <= max(float(n), sum(away)) + 1e-9, "GPU has what is there, the CPU the rest"
    assert (savings(*args) <= seconds + 1e-9).all()


def test_adapmoe_gives_slots_where_guesses_are_worst():
    view = View(32, 8, 2)
    policy = SlotsByLoads()
    slots_L = policy.slots_L(64, view)
    assert slots_L.sum() == 64 and slots_L[0] == slots_L.max() and slots_L[1] > slots_L[30]

    def loads(chosen_L):
        return sum(policy.loads_T(layer, 8, 2)[t] for layer, t in enumerate(chosen_L))

    assert loads(slots_L) < loads(np.full(32, 2))
    for one in range(0, 32, 5):  # no exchange of one slot is better
        for other in range(32):
            if slots_L[one] < 8 and slots_L[other] > 0 and one != other:
                moved = slots_L.copy()
                moved[one] += 1
                moved[other] -= 1
                assert loads(moved) >= loads(slots_L) - 1e-12


# Every policy of each kind


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.6])
def test_a_cache_never_has_more_than_its_room_and_every_use_is_counted(cache, fraction):
    scenario = offloaded(fraction, cache=cache, prefetch="by_activity", predictor="oracle_stated", outputs=20)
    iterations = Iterations(scenario)
    run = OffloadedRun(iterations)
    needed, store = 0, run.steps.store
    for iteration in iterations:
        run.play(iteration)
        needed += int((iteration.counts.load_LRS[:, 0] > 0).sum())
        assert store.num_held <= store.slots_L.sum() <= 3 * np.ceil(8 * fraction)
        if CACHES[cache].scope == "layer":
            assert (store.view.held_P.reshape(3, 8).sum(axis=1) <= store.slots_L).all()
    assert store.uses.total == needed


@pytest.mark.parametrize("cache", [name for name, policy in CACHES.items() if not policy.needs_future])
@pytest.mark.parametrize("seed", range(3))
def test_the_oracle_of_its_scope_is_never_beaten(cache, seed):
    """Without prefetching, one token a step, from the same start."""
    oracle = "oracle_belady" if CACHES[cache].scope == "layer" else "oracle_belady_device"

    def misses(name):
        run, _ = played(offloaded(0.5, seed=seed, cache=name, outputs=60, requests=2))
        return run.steps.store.uses.missed

    assert misses(oracle) <= misses(cache)


@pytest.mark.parametrize("top_k", [1, 2])
def test_hits_are_those_of_the_one_pass_over_all_sizes(top_k):
    """One request, each layer with slots of its own: MIN as in `routing.reuse`, and LRU where ties cannot be."""
    trace = zipf_trace(3, 8, top_k, num_requests=1, prompt_tokens=1, output_tokens=300, seed=3)
    used_SLE = np.zeros((301, 3, 8), np.bool_)
    used_SLE[np.arange(301)[:, None, None], np.arange(3)[None, :, None], trace.expert_ids_TLK] = True
    for name, hits_LC in (("oracle_belady", belady_hits_LC(trace)), ("lru", lru_hits_LC(trace))):
        for slots in range(top_k, 8):
            view = View(3, 8, top_k)
            store = ExpertStore(view, 3 * slots, CACHES[name](), used_SLE)
            for held in np.flatnonzero(view.held_P):  # begin empty
                store._drop([int(held)])
            for view.step in range(301):
                for view.layer in range(3):
                    (view.ids,) = used_SLE[view.step, view.layer].nonzero()
                    view.load = np.ones(len(view.ids), np.int64)
                    store.used()
                    places = view.layer * 8 + view.ids
                    here_N, _ = store.count(places)
                    store.make_room(places[~here_N].tolist())
                    store.release()
            if name == "oracle_belady" or top_k == 1:
                assert store.uses.cached == hits_LC[:, slots].sum()
            else:
                assert store.uses.cached == pytest.approx(hits_LC[:, slots].sum(), abs=15)


@pytest.mark.parametrize("cache", CACHES)
def test_hits_at_many_sizes_are_those_of_the_engine(cache):
    """One pass over a trace for all sizes, or the clock with each of them."""
    trace = sticky_trace(4, 8, 2, stickiness=0.3, num_tokens=60, seed=1)
    rows, sizes, policy = [np.array([t]) for t in range(50)], (6, 9, 16, 25), CACHES[cache]()
    predictor = OracleStated((0.7, 0.5))
    played = [
        replay(trace, rows, UnitTimes(1.0, 1.0), c, PolicySet(policy, predictor), history=np.arange(50, 60)).uses
        for c in sizes
    ]
    hits_C = hit_rates_C(trace, rows, policy, sizes, predictor=predictor, history=np.arange(50, 60))
    if cache != "random":
        np.testing.assert_allclose(hits_C, [uses.hit_rate for uses in played], rtol=1e-12)
    assert (np.diff(hits_C) > -0.05).all() and 0 <= hits_C.min() <= hits_C.max() < 1


@pytest.mark.parametrize("system", REPLAYED)
def test_every_system_runs_with_causes_before_effects(system):
    scenario = offloaded(0.5, seed=1, requests=2, **SYSTEMS[system])
    assert scenario.mistakes() == []
    run, steps = played(scenario)
    for step in steps:
        assert (step.start_NR <= step.finish_NR).all() and (step.finish_NR <= step.seconds).all()
        for op, start in zip(step.operations, step.start_NR[:, 0], strict=True):
            assert all(step.finish_NR[a, 0] <= start + 1e-12 for a in op.after)
        for unit in ("compute", "cpu", "h2d"):
            mine = [n for n, op in enumerate(step.operations) if op.resource == unit]
            spans = step.finish_NR[mine, 0] - step.start_NR[mine, 0]
            if not PREFETCHERS[scenario.policies.prefetch].preempts or unit != "h2d":
                assert spans.sum() <= step.seconds * (1 + 1e-9), "a unit works on one thing at a time"
    assert simulate(scenario).metrics == estimate(scenario).metrics
    assert run.steps.store.uses.total > 0


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_miss_is_never_free(executor):
    """With nobody to guess, whatever is missing is copied or computed elsewhere, and the step is longer for it."""
    away = offloaded(0.0, executor=executor)
    run, steps = played(away)
    store, prices = run.steps.store, run.prices
    assert store.uses.missed == store.uses.total
    copied = sum(
        step.costs.bytes_NR[n, 0] for step in steps for n, op in enumerate(step.operations) if op.resource == "h2d"
    )
    computed = sum(
        step.costs.bytes_NR[n, 0]
        for step in steps
        for n, op in enumerate(step.operations)
        if op.name in ("cpu_experts", "near_experts")
    )
    whole = store.uses.missed * prices.bytes_E[0]
    if executor == "bit_planes":  # of 2 to 4 bits, what the tokens need
        assert 0.5 * whole < copied < whole
    else:
        assert copied + computed == pytest.approx(whole)
    here = dataclasses.replace(away, policies=dataclasses.replace(away.policies, device_expert_fraction=1.0))
    assert sum(step.seconds for step in steps) > estimate(here).metrics["e2e_s"]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_executor_gives_every_expert_one_unit_and_copies_what_the_gpu_lacks(executor):
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 8))
        load = np.sort(rng.integers(1, 9, n))[::-1].astype(np.int64)
        here = rng.random(n) < 0.4
        job = Work(
            np.arange(n), load, here, ~here & (rng.random(n) < 0.2), 0.2 + 0 * load, 0.5 * load, 0.4 * load,
            float(rng.random() * 3),
        )  # fmt: skip
        plan = EXECUTORS[executor]().plan(job)
        needs_copy = (plan.unit_N == GPU) & ~(job.is_here | job.is_coming)
        assert sorted(plan.copies) == np.flatnonzero(needs_copy).tolist()
        assert set(plan.unit_N) <= {GPU, {"cpu": CPU, "near": NEAR}.get(EXECUTORS[executor].needs, GPU)}
        assert all(plan.unit_N[i] == CPU for i in plan.deferred)


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("cache", ["lru", "mrs", "activation_aware", "arc"])
def test_a_policy_cannot_see_the_future(predictor, cache):
    """Changing what the last step routes to changes nothing before it, whatever the trace's end."""
    scenario = offloaded(0.5, outputs=8, cache=cache, predictor=predictor, prefetch="next_layer")
    trace = scenario.trace
    row = np.flatnonzero(trace.is_decode_T)[scenario.workload.output_tokens - 2]  # the last that is replayed
    other_ids, other_predicted = trace.expert_ids_TLK.copy(), trace.predicted_HTLW[0].copy()
    other_ids[row] = (other_ids[row] + 1) % trace.num_experts
    other_predicted[row] = (other_predicted[row] + 1) % trace.num_experts
    changed = dataclasses.replace(
        scenario, trace=dataclasses.replace(trace, expert_ids_TLK=other_ids, predicted_HTLW=(other_predicted,))
    )
    assert estimate(scenario).step_s[:-1] == estimate(changed).step_s[:-1]


def test_better_guesses_never_take_longer_where_the_link_has_time():
    """With computation that hides every copy, an oracle makes all experts ready, and no guess misses all."""
    slow = offloaded(0.5, heads=4096, cache="lru", prefetch="next_layer", predictor="oracle", outputs=20)
    seconds = {}
    for name in ("oracle", "oracle_stated", "none"):
        policies = dataclasses.replace(
            slow.policies, predictor=name, prefetch="none" if name == "none" else "next_layer"
        )
        _, steps = played(dataclasses.replace(slow, policies=policies))
        seconds[name] = sum(step.seconds for step in steps[1:])
    assert seconds["oracle"] < seconds["oracle_stated"] < seconds["none"]


@pytest.mark.parametrize("system", REPLAYED)
def test_all_experts_on_the_device_is_the_floor(system):
    scenario = offloaded(0.5, **SYSTEMS[system])
    whole = dataclasses.replace(scenario, policies=dataclasses.replace(scenario.policies, device_expert_fraction=1.0))
    assert estimate(scenario).metrics["tpot_s"] >= estimate(whole).metrics["tpot_s"] * (1 - 1e-9)


# Units beside the memory


def two_lines(device, load, expert_bytes, flops_per_token):
    return np.maximum(load * flops_per_token / device.flops_per_s["bf16"], expert_bytes / device.memory.bytes_per_s)


def test_duplex_two_line_roofline():
    """Mixtral on H100, experts dealt to 4 devices: 3.0 and 1.8 times as fast with 8 tokens an expert, 1.8 and 1.0 with
    16; experts cut over the devices and shared out by look-up 2.3 with 16 (attention and projections included)."""
    gpu, pim, bank = (load_device(name) for name in ("h100-sxm-80gb", "duplex-logic-pim", "duplex-bank-pim"))
    params = 3 * 4096 * 14336
    rest_s = (2 * 41.9e6 + 64 * 384 * 4096) / 4 / gpu.memory.bytes_per_s  # what stays on the GPU; caches move too

    def rates(load, tp=1):
        loads = np.full(8 if tp > 1 else 2, float(load))
        times = [two_lines(d, loads, 2 * params / tp, 2 * params / tp) for d in (gpu, pim, bank)]
        return times, [float(t.sum()) for t in times]

    for load, wanted in ((8, (3.0, 1.8)), (16, (1.8, 1.0))):
        _, (on_gpu, on_pim, on_bank) = rates(load)
        assert (on_gpu + rest_s) / (on_pim + rest_s) == pytest.approx(wanted[0], rel=0.15)
        assert (on_gpu + rest_s) / (on_bank + rest_s) == pytest.approx(wanted[1], rel=0.15)
    (gpu_N, pim_N, _), (whole, _, _) = rates(16, tp=4)
    is_near = look_up(gpu_N, pim_N)
    both = max(gpu_N[~is_near].sum(), pim_N[is_near].sum())
    assert (whole + rest_s) / (both + rest_s) == pytest.approx(2.3, rel=0.15)


def test_monde_break_even():
    """Beside the memory a Mixtral expert takes 0.69 ms up to 4 tokens; a copy 11 ms: as fast at about 64 tokens."""
    monde, params = load_device("monde-ndp"), 3 * 4096 * 14336
    seconds = two_lines(monde, np.arange(200.0), 2 * params, 2 * params)
    assert seconds[1] == seconds[4] == pytest.approx(0.69e-3, rel=0.01) and seconds[5] > seconds[4]
    copy_s = 2 * params / 32e9
    assert copy_s == pytest.approx(11e-3, rel=0.01)
    assert int(np.searchsorted(seconds, copy_s)) == pytest.approx(64, abs=1)


@few
@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=7), st.floats(0.1, 9))
def test_sharing_out_by_look_up_is_the_best_cut(gpu_s, factor):
    """Among all cuts of the order of tokens, which is among all subsets where times grow alike."""
    gpu_N = np.sort(np.array(gpu_s))[::-1]
    near_N = gpu_N * factor
    is_near = look_up(gpu_N, near_N)
    found = max(gpu_N[~is_near].sum(), near_N[is_near].sum())
    cuts = [max(gpu_N[:k].sum(), near_N[k:].sum()) for k in range(len(gpu_N) + 1)]
    assert found == pytest.approx(min(cuts)) and found <= min(gpu_N.sum(), near_N.sum()) + 1e-12


def test_hot_experts_are_copied_as_bandwidths_balance():
    """Twelve experts bound by bandwidth on both sides, link and unit as 1 to 3: a quarter is copied."""
    n = 12
    work = Work(
        np.arange(n), np.ones(n, np.int64), np.zeros(n, np.bool_), np.zeros(n, np.bool_), np.zeros(n),
        np.full(n, np.inf), np.full(n, 1.0), 3.0,
    )  # fmt: skip
    plan = HotCold().plan(work)
    assert len(plan.copies) == n * (1 / 3) / (1 / 3 + 1) and (plan.unit_N[plan.copies] == GPU).all()
    assert (plan.unit_N == NEAR).sum() == n - 3


@pytest.mark.parametrize("prefetch", PREFETCHERS)
def test_a_prefetcher_names_experts_of_layers_to_come_that_are_not_here(prefetch, monkeypatch):
    """The next layers, around the end where it goes by layers; each at most once."""
    policy, asked = PREFETCHERS[prefetch], []
    choose = policy.choose

    def seen(self, view, outlook):
        found = list(choose(self, view, outlook))
        asked.append((view.layer, found, view.not_here(0, view.held_P.size)[found].all(), len(set(found))))
        return found

    monkeypatch.setattr(policy, "choose", seen)
    predictor = "oracle_stated" if policy.needs_predictions else "none"
    played(offloaded(0.5, heads=512, outputs=20, cache="lru", predictor=predictor, prefetch=prefetch))
    assert any(found for _, found, _, _ in asked) == (prefetch != "none")
    for layer, found, all_lack, num_distinct in asked:
        assert all_lack and num_distinct == len(found)
        assert policy.bulk or all(place // 8 > layer for place in found)


def test_pre_gated_transfers():
    """One expert of Switch-Large in 32 bits over 32 GB/s takes 1.05 ms, all 128 of a block 134 ms."""
    experts = load_model("switch-large-128").experts
    times = UnitTimes(4.0 * experts.expert_params(1024, experts.expert_widths[0]), 32e9)
    assert times.copy_s == pytest.approx(1.05e-3, rel=0.01)
    assert experts.num_experts * times.copy_s == pytest.approx(134e-3, rel=0.01)


# The disk


def test_host_memory_keeps_what_was_asked_for_last():
    host = HostLevel(2)
    assert host.read([0, 1]) == []
    assert host.read([2]) == [2], "0 leaves, the one asked for longest ago"
    assert host.read([1, 0]) == [0]
    host.forget([1])
    assert host.read([1]) == [1]
    assert HostLevel(0).read([5, 5]) == [5, 5]


def step_of(trace, host_slots, policies=None, **times):
    rows = [np.array([t]) for t in range(len(trace.expert_ids_TLK))]
    given = UnitTimes(10.0, 10.0, disk_bytes_per_s=5.0, **times)
    return replay(trace, rows, given, 0, policies, host_slots=host_slots)


def test_an_expert_on_disk_is_read_and_then_copied():
    """Reads take 2 s, copies 1 s; the second of a layer is read while the first is copied."""
    trace = sticky_trace(1, 4, 2, stickiness=0.0, num_tokens=6)
    everything = step_of(trace, None)
    assert everything.seconds_S.tolist() == [2.0] * 6 and "disk" not in everything.busy_s
    nothing = step_of(trace, 0)
    assert nothing.seconds_S.tolist() == [5.0] * 6
    assert nothing.busy_s["disk"] == 24.0 and nothing.busy_s["h2d"] == 12.0
    some = step_of(trace, 2)
    assert everything.seconds_S.sum() < some.seconds_S.sum() <= nothing.seconds_S.sum()
    on_cpu = step_of(trace, 0, PolicySet(executor=CPUOnly()), cpu_expert_s=1.0)
    assert on_cpu.seconds_S.tolist() == [6.0] * 6, "one burst, after both are read"


@pytest.mark.parametrize("system", REPLAYED)
def test_every_system_reads_from_disk_what_it_never_had(system):
    trace = sticky_trace(4, 8, 2, stickiness=0.3, num_tokens=20)
    rows = [np.array([t]) for t in range(20)]
    times = UnitTimes(10.0, 10.0, 0.1, cpu_expert_s=0.5, near_expert_s=0.2, disk_bytes_per_s=5.0)
    whole, half = (
        replay(trace, rows, times, 8, PolicySet.of(system), layer_s=0.5, history=np.arange(20), host_slots=slots)
        for slots in (None, 16)
    )
    assert half.seconds_S.sum() >= whole.seconds_S.sum() * 0.98
    copies = whole.busy_s.get("h2d", 0.0) + whole.busy_s.get("cpu", 0.0)
    assert (half.busy_s.get("disk", 0.0) > 0) == (copies > 0)


def test_a_scenario_reads_from_disk_what_host_memory_cannot_hold():
    away = offloaded(0.0)
    needed, _ = away.host_bytes()
    host = away.cluster.host
    small = dataclasses.replace(host, memory=dataclasses.replace(host.memory, capacity_bytes=needed / 2))
    disk = load_device("nvme-pcie4")
    without, slow = (
        dataclasses.replace(away, cluster=dataclasses.replace(away.cluster, host=small, disk=d)) for d in (None, disk)
    )
    assert any('disk = "nvme-pcie4"' in mistake for mistake in without.mistakes())
    assert not slow.mistakes()
    found, base = estimate(slow).metrics, estimate(away).metrics
    assert 0 < found["disk_busy_fraction"] <= 1 and "disk_busy_fraction" not in base
    assert found["tpot_s"] > base["tpot_s"]
    tiny = dataclasses.replace(disk, memory=dataclasses.replace(disk.memory, capacity_bytes=needed / 2))
    full = dataclasses.replace(slow, cluster=dataclasses.replace(slow.cluster, disk=tiny))
    assert any("nor on the disk" in mistake for mistake in full.mistakes())


# Bit planes, the whole path, and grouping


def test_more_tokens_need_wider_experts():
    """One token needs 3 bits of 4 in the mean; of many, one needs all 4."""
    load = np.array([1, 2, 100])
    no, s = np.zeros(3, np.bool_), np.ones(3)
    plan = BitPlanes().plan(Work(load, load, no, no, s, s, s, 1.0))
    two = 0.3**2 * 2 + (0.7**2 - 0.3**2) * 3 + (1 - 0.7**2) * 4
    assert plan.shares == pytest.approx([3 / 4, two / 4, 1.0]) and plan.copies == [0, 1, 2]


def test_what_is_known_of_the_first_layer_travels_before_it():
    """Copies of a second, a layer of 10 s before each router: nothing is waited for."""
    trace = sticky_trace(3, 8, 2, stickiness=0.0, num_tokens=12)
    rows = [np.array([t]) for t in range(12)]
    ahead = PolicySet.of("expertflow")
    ahead = dataclasses.replace(ahead, predictor=Oracle(), prefetch=WholePathAhead())
    found = replay(trace, rows, UnitTimes(1.0, 1.0), 12, ahead, layer_s=10.0)
    assert found.seconds_S.tolist() == [30.0] * 12 and found.uses.missed == found.uses.late == 0


routes = st.integers(1, 40).flatmap(
    lambda T: st.tuples(st.just(T), st.integers(1, 30), st.integers(0, 10**6), st.integers(1, 3))
)


@few
@given(routes, st.sampled_from(sorted(GROUPINGS)))
def test_a_group_is_full_and_has_every_token_once(shape, name):
    T, size, seed, L = shape
    ids_TLK = np.random.default_rng(seed).random((T, L, 6)).argpartition(2, axis=2)[:, :, :2]
    batch = GROUPINGS[name]().batch(ids_TLK, 6, size)
    assert len(batch) == min(size, T) == len(set(batch.tolist())) and set(batch.tolist()) <= set(range(T))


def test_tokens_of_one_kind_are_put_together():
    kinds = np.array([0, 1, 0, 1, 1, 0, 1, 0])
    ids_TLK = np.stack([np.stack([2 * kinds, 2 * kinds + 1], axis=1)] * 3, axis=1)
    assert kinds[Regrouped().batch(ids_TLK, 4, 4)].tolist() == [0] * 4, "with the oldest token"
    assert kinds[LongestQueue().batch(ids_TLK[:7], 4, 4)].tolist() == [1] * 4


def test_energy_is_that_of_the_memory_that_is_read():
    near, gpu = (offloaded(1.0, heads=8, executor=name) for name in ("near_only", "on_demand"))
    device = dataclasses.replace(near.cluster.device, energy_j={"byte": 3.0})
    cluster = dataclasses.replace(
        near.cluster, device=device, near=dataclasses.replace(near.cluster.near, energy_j={"byte": 1.0})
    )
    there = OffloadedRun(Iterations(dataclasses.replace(near, cluster=cluster)))
    here = OffloadedRun(Iterations(dataclasses.replace(gpu, cluster=cluster)))
    joules = []
    for run in (there, here):
        for iteration in run._iterations:
            run.play(iteration)
        joules.append(run.metrics()["expert_read_joules_per_iteration"])
    assert joules[1] == pytest.approx(3 * joules[0])
    assert "expert_read_joules_per_iteration" not in estimate(near).metrics
