"""Wide expert parallelism: overlap, drafts, ways of dispatch, flows, faults, rebalancing, and the published rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import small_cluster, small_model, small_scenario
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.estimate import estimate
from moesim.faults import Faults
from moesim.files.scenarios import load_scenarios
from moesim.layout import AttentionGrid
from moesim.mixers import Mamba
from moesim.policies import Policies
from moesim.policies.collective import ALL_TO_ALLS
from moesim.policies.placement import Eplb
from moesim.program.batch import Batch, Members
from moesim.program.iterations import Iterations
from moesim.program.walk import account, walk
from moesim.routing.synthetic import even_trace, zipf_trace
from moesim.simulate import simulate
from moesim.validate.cases import summary
from moesim.validate.wide_ep import validate_wide_ep
from moesim.validate.wide_ep_setups import SETUPS


def with_policies(scenario, **changes):
    return dataclasses.replace(scenario, policies=dataclasses.replace(scenario.policies, **changes))


def with_workload(scenario, **changes):
    return dataclasses.replace(scenario, workload=dataclasses.replace(scenario.workload, **changes))


def steps(scenario):
    return [(i.phase, walk(i.program, i.costs)) for i in Iterations(scenario)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=20), st.sampled_from([1, 2]))
def test_two_batches_hold_every_token_once_and_share_each_group(requests, queries):
    group_Q, lengths_Q = (np.array(x) for x in zip(*sorted(requests), strict=True))
    for phase in ("prefill", "decode"):
        each = lengths_Q if phase == "prefill" else np.full(len(group_Q), queries)
        rows_B = np.arange(each.sum())
        members = Members(np.arange(len(group_Q)), lengths_Q, group_Q, np.repeat(group_Q, each), 4)
        batch = Batch(phase, members, rows_B, queries)
        one, two = batch.halves()
        assert sorted([*one.rows_B, *two.rows_B]) == rows_B.tolist()
        assert sorted([*one.members.lengths_Q, *two.members.lengths_Q]) == sorted(lengths_Q)
        assert (one.queries, two.queries) == (queries, queries)
        for half in (one, two):
            assert len(half.rows_B) == (
                sum(half.members.lengths_Q) if phase == "prefill" else queries * len(half.members.lengths_Q)
            )
        tokens_DH = np.stack([np.bincount(half.members.group_B, minlength=4) for half in (one, two)], axis=1)
        assert (np.abs(np.diff(tokens_DH, axis=1))[:, 0] <= each.max()).all()


@pytest.mark.parametrize("nodes", [1, 2])
def test_overlap_hides_communication_of_large_batches_and_costs_small_ones(nodes):
    """The weights are read twice, and every kernel is launched twice."""
    gained = []
    for requests in (16, 4096):
        base = small_scenario(nodes=nodes, layers=8, requests=requests, outputs=2)
        one, two = steps(base), steps(with_policies(base, two_batch_overlap=True))
        for (_, alone), (_, both) in zip(one, two, strict=True):
            busy = {kind: sum(both.costs.seconds_NR[n] for n, op in enumerate(both.operations) if op.resource == kind)
                    for kind in ("compute", "network")}  # fmt: skip
            assert both.seconds >= max(x.max() for x in busy.values())  # no stream does two things at once
            assert both.costs.bytes_NR.sum() == pytest.approx(alone.costs.bytes_NR.sum())
            assert both.costs.seconds_NR.sum() >= alone.costs.seconds_NR.sum()
        gained.append(one[-1][1].seconds / two[-1][1].seconds)
    assert gained[0] < 1 < gained[1]


def test_cores_that_communicate_do_not_compute():
    base = with_policies(small_scenario(nodes=2, requests=64), two_batch_overlap=True, all_to_all="rails")
    slowed = 1 / (1 - ALL_TO_ALLS["rails"].sm_fraction)
    alone = with_policies(base, two_batch_overlap=False)
    for scenario, factor in ((base, slowed), (alone, 1.0)):
        with_sms, without = steps(scenario)[-1][1], steps(with_policies(scenario, all_to_all="flat"))[-1][1]
        for n, op in enumerate(with_sms.operations):
            if op.resource == "compute":
                assert with_sms.costs.seconds_NR[n] == pytest.approx(factor * without.costs.seconds_NR[n])


def test_drafts_cost_a_layer_and_gain_what_is_accepted():
    base = small_scenario(requests=8, outputs=9)
    drafting = with_workload(base, num_speculative_tokens=1, acceptance_rate=0.6)
    plain, found = estimate(base).metrics, estimate(drafting).metrics
    assert drafting.workload.tokens_per_decode == 1.6
    assert found["num_decode_iterations"] == 5 and plain["num_decode_iterations"] == 8
    assert found["tpot_s"] * 1.6 == pytest.approx(found["decode_iteration_s"])
    assert found["decode_iteration_s"] > plain["tpot_s"] > found["tpot_s"]
    never = estimate(with_workload(base, num_speculative_tokens=1, acceptance_rate=0.0)).metrics
    assert never["tpot_s"] > plain["tpot_s"]
    program = Iterations(drafting).forward.program
    names = [op.name for op in program.operations if op.layer == len(base.model.layers)]
    assert names == ["attention", "router", "dispatch", "experts", "combine", "head"]
    assert dataclasses.replace(drafting.workload, num_speculative_tokens=2).tokens_per_decode == pytest.approx(1.96)


@pytest.mark.parametrize("name", sorted(ALL_TO_ALLS))
def test_flows_are_never_faster_than_the_fullest_link_and_ports_are_a_bound(name):
    """`simulate` plays the rounds whose fullest links `estimate` adds up."""
    base = with_policies(small_scenario(nodes=2, requests=24), all_to_all=name, network="flows")
    bound, played = estimate(base), simulate(base)
    assert played.metrics["tpot_s"] >= bound.metrics["tpot_s"] * (1 - 1e-9)
    assert played.metrics["tpot_s"] < 2 * bound.metrics["tpot_s"]


@pytest.mark.parametrize("name", ["flat", "low_latency"])
def test_both_engines_and_ports_agree_where_nothing_contends(name):
    """In one node behind a switch a rank's ports are all there is; flows add the latency of their path once."""
    base = with_policies(small_scenario(requests=16), all_to_all=name)
    base = dataclasses.replace(base, trace=even_trace(2, 8, 2), cluster=small_cluster(latency=1e-9))
    flows = with_policies(base, network="flows")
    ports = estimate(base).metrics["tpot_s"]
    assert estimate(flows).metrics["tpot_s"] == pytest.approx(ports, rel=1e-6)
    assert simulate(flows).metrics["tpot_s"] == pytest.approx(ports, rel=0.02)


def test_faults_slow_what_they_touch():
    base = with_policies(small_scenario(nodes=2, requests=64), network="flows")
    whole = estimate(base).metrics["tpot_s"]
    for faults in (Faults({"3": 0.5}), Faults(links={"n0/gpu1": 0.5}), Faults(links={"n1/gpu0 - leaf0": 0.0})):
        assert not faults.mistakes(base.cluster)
        assert estimate(dataclasses.replace(base, faults=faults)).metrics["tpot_s"] > whole * 1.01
    slow = estimate(dataclasses.replace(base, faults=Faults({"3": 0.5})), timeline=1)
    ends = {r.rank: r.finish_s - r.start_s for r in slow.records if r.name == "attention" and r.phase == "decode"}
    assert ends[3] == pytest.approx(2 * ends[2])


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([(4, 8, 1, 1), (8, 256, 8, 4), (2, 6, 1, 1), (4, 16, 4, 2)]), st.integers(0, 5))
def test_even_routing_is_even_in_every_step_and_in_every_request(shape, seed):
    top_k, num_experts, num_groups, top_groups = shape
    trace = even_trace(3, num_experts, top_k, num_groups, top_groups, seed=seed)
    hands = num_experts // top_k
    for rows in (trace.position_T == 1, trace.request_T == 0):
        for layer in range(3):
            ids_TK = trace.expert_ids_TLK[rows, layer]
            counts_E = np.bincount(ids_TK.ravel(), minlength=num_experts)
            assert (counts_E == rows.sum() // hands).all()
            assert all(len(set(ids)) == top_k for ids in ids_TK.tolist())
            size = num_experts // num_groups
            assert all(len({i // size for i in ids}) == top_groups for ids in ids_TK.tolist() if num_groups > 1)


def test_eplb_places_as_its_published_example():
    load_LE = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]], float)  # fmt: skip
    assert Eplb(num_groups=4).place(16, 8, 4, load_LE).slot_expert_LP.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_rebalancing_helps_on_requests_that_it_has_not_seen():
    base = small_scenario(nodes=1, experts=16, requests=8, outputs=6, redundant=4)
    skewed = zipf_trace(2, 16, 2, num_requests=40, prompt_tokens=40, output_tokens=40, exponent=1.5)
    base = with_workload(dataclasses.replace(base, trace=skewed), num_requests=400)
    load = {name: estimate(with_policies(base, placement=name)).metrics["expert_load_max_to_mean_ratio"]
            for name in ("contiguous", "eplb")}  # fmt: skip
    assert load["eplb"] < 1.15 < load["contiguous"]
    run = Iterations(with_policies(base, placement="eplb"))
    replayed = {int(r) for rows in (*run.replay.prompts, *run.replay.answers) for r in skewed.request_T[rows]}
    assert len(replayed) == 20 and not replayed & set(skewed.request_T[run.replay.history].tolist())


def test_ranks_of_the_shared_expert_serve_every_token():
    base = small_scenario(nodes=2, per_node=5, experts=8, shared=64, requests=40)
    layout = dataclasses.replace(base.layout, num_shared_expert_ranks=2)
    apart = dataclasses.replace(base, layout=layout)
    assert not apart.mistakes()
    step = list(Iterations(apart))[-1]
    assert "shared_experts" not in {op.name for op in step.program.operations}
    assert (step.counts.load_LRS.sum(axis=(1, 2)) == 40 * 3).all()  # two of its own, and the shared one
    assert (step.counts.load_LRS[:, 8:, 0] == 20).all()
    assert any("num_shared_expert_ranks" in said for said in dataclasses.replace(
        apart, layout=dataclasses.replace(layout, num_shared_expert_ranks=3)).mistakes())  # fmt: skip


SCENARIO = """
model = "olmoe-1b-7b"
hardware = "2 x hgx-h100"
trace = "zipf"
[layout]
attention = {{ dp = 16 }}
experts = {{ ep = 16 }}
[workload]
num_requests = 16
output_tokens = 3
{more}
"""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('[policies]\nnetwork = "flows"\n[faults]\nlinks = { "n0/nic9" = 0.5 }', "no n0/nic9 in its topology"),
        ('[policies]\nnetwork = "flows"\n[faults]\nlinks = { "n0/gpu0 - n1/gpu0" = 0 }', "no n0/gpu0 - n1/gpu0 in its"),
        ('[faults]\nlinks = { "n0/nic0" = 0.5 }', 'set policies.network = "flows"'),
        ('[faults]\ndevices = { "99" = 0.5 }', "'99' is not a rank of 2 x hgx-h100; 0 to 15 would do"),
        ('[faults]\ndevices = { "1" = 0 }', "rank 1 must keep a share of its speed above 0 to 1, given 0"),
        ('[policies]\nall_to_all = "leaders"', "known by its rounds of messages only"),
        ("[policies]\ntwo_batch_overlap = true", "needs two requests in each of 16 groups"),
        ('[policies]\nnetwork = "wires"', 'policies.network: must be "ports" or "flows"'),
        ('[policies]\nall_to_all = "flatt"', "policies.all_to_all: unknown 'flatt'"),
        ("num_speculative_tokens = -1", "num_speculative_tokens must be 0 or more"),
        ("acceptance_rate = 2.0", "acceptance_rate must lie in 0..1"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, more, said):
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO.format(more=more))
    with pytest.raises(ValueError) as error:
        load_scenarios(path)
    assert said in str(error.value)


def test_a_rank_without_a_route_is_told(tmp_path):
    path = tmp_path / "scenario.toml"
    cut = ", ".join(f'"n0/{kind}{i}" = 0' for kind in ("nic",) for i in range(8))
    more = f'[policies]\nnetwork = "flows"\n[faults]\nlinks = {{ {cut} }}'
    path.write_text(SCENARIO.format(more=more))
    with pytest.raises(ValueError, match=r"no path from n\d/gpu\d to n\d/gpu\d"):
        estimate(load_scenarios(path)[0])


def test_part_of_a_machine_and_even_routing_in_a_file(tmp_path):
    path = tmp_path / "scenario.toml"
    text = SCENARIO.format(more="").replace("2 x hgx-h100", "16 of gb200-nvl72").replace("zipf", "even")
    path.write_text(text)
    (scenario,) = load_scenarios(path)
    assert scenario.cluster.num_ranks == 16 and scenario.trace.name == "even-16x64"
    assert estimate(scenario).metrics["expert_load_max_to_mean_ratio"] < 1.5
    path.write_text(text.replace("16 of", "99 of"))
    with pytest.raises(ValueError, match="has 72 devices, of which 1 to 72 can be used, given 99"):
        load_scenarios(path)


def test_wide_ep_meets_the_rows_it_is_fitted_to():
    found = validate_wide_ep(even_trace(58, 256, 8, 8, 4), SETUPS[:2])
    fitted = [case for case in found.cases if case.fitted]
    assert len(fitted) == 2 and all(abs(case.error) < 0.05 for case in fitted)
    assert summary(fitted)["rows"] == 0  # they count in no error
    assert all(case.low < case.predicted < case.high for case in found.cases)


@pytest.mark.slow
def test_wide_ep_predicts_published_deployments():
    """Bounds as they were found, so that a change in either direction is seen."""
    trace = zipf_trace(58, 256, 8, num_requests=64, prompt_tokens=64, output_tokens=64, exponent=0.5)
    found = {case.case: case for case in validate_wide_ep(trace).cases}
    for name, most in (("SGLang, decode EP72, 256 at 2K", 0.15),
                       ("DeepSeek production, decode EP144, 128 at 5K", 0.15)):  # fmt: skip
        assert abs(found[name].error) < most
        assert found[name].is_covered
    for name in ("SGLang, prefill EP32, 4K", "SGLang, decode EP72, 256 at 2K"):
        assert found[name].predicted > 1.05 * found[f"{name}, not rebalanced"].predicted


def test_defaults_change_nothing():
    """Ways that are not asked for cost nothing: one batch, ports, a token once to each rank."""
    base = small_scenario(nodes=2)
    assert base.policies == Policies()
    assert estimate(base).metrics == estimate(with_policies(base, all_to_all="flat", network="ports")).metrics
    assert small_model().experts.num_groups == 1


@pytest.mark.parametrize("spread", [True, False])
def test_context_parallel_ranks_share_the_tokens(spread):
    """Half the queries each, the same experts' tokens in all; what they exchange takes the place of waiting."""
    base = small_scenario(nodes=1, spread=spread, tp=1, requests=8, outputs=3, prompts=64)
    experts = base.layout.experts
    grids = {cp: dataclasses.replace(base.layout, attention=AttentionGrid(4 // cp, 1, cp), experts=experts)
             for cp in (1, 2, 4)}  # fmt: skip
    found = {cp: dataclasses.replace(base, layout=layout) for cp, layout in grids.items()}
    assert not any(scenario.mistakes() for scenario in found.values())
    played = {cp: list(Iterations(scenario)) for cp, scenario in found.items()}
    for one, two, four in zip(*played.values(), strict=True):
        loads = [i.counts.load_LRS.sum(axis=(1, 2)) for i in (one, two, four)]
        assert (loads[0] == loads[1]).all() and (loads[0] == loads[2]).all()
        assert "kv_exchange" not in one.program.parts and "kv_exchange" in two.program.parts
        for other in (two, four):
            walked = walk(other.program, other.costs)
            exposed_XR, idle_R = account(walked)
            np.testing.assert_allclose(exposed_XR.sum(axis=0) + idle_R, walked.seconds, rtol=1e-12)
    memory = [scenario.memory_bytes()["kv_cache"] for scenario in found.values()]
    assert memory[0] == pytest.approx(memory[2])  # four times the requests of a group, a quarter of each


def test_one_long_prompt_is_faster_on_more_ranks():
    base = small_scenario(requests=1, outputs=2, prompts=4096)
    prefill = {}
    for cp in (1, 4):
        layout = dataclasses.replace(base.layout, attention=AttentionGrid(4 // cp, 1, cp))
        prefill[cp] = estimate(dataclasses.replace(base, layout=layout)).metrics["ttft_s"]
    assert prefill[4] < 0.6 * prefill[1]
    recurrent = dataclasses.replace(base.layout, attention=AttentionGrid(2, 1, 2))
    layers = tuple(dataclasses.replace(layer, mixer=Mamba(16, 4, 2, 8)) for layer in base.model.layers)
    mistakes = dataclasses.replace(
        base, layout=recurrent, model=dataclasses.replace(base.model, layers=layers)
    ).mistakes()
    assert any("cannot be cut by tokens" in said for said in mistakes)


def on_a_belt(base, pp, dp):
    experts = dataclasses.replace(base.layout.experts, ep=dp if base.layout.experts.ep > 1 else 1)
    return dataclasses.replace(
        base, layout=dataclasses.replace(base.layout, pp=pp, attention=AttentionGrid(dp), experts=experts)
    )


@pytest.mark.parametrize("dense_first", [True, False])
def test_a_pipeline_runs_every_layer_for_every_batch_once(dense_first):
    """On half the ranks with twice the requests each, whole layers cost what they cost on one stage alone."""
    base = small_scenario(nodes=2, per_node=4, layers=6, requests=16, outputs=3, dense_first=dense_first)
    belt = on_a_belt(base, 2, 4)
    assert not belt.mistakes()
    steps_, stage = list(Iterations(belt)), Iterations(belt)
    for step in steps_:
        assert step.program.num_ranks == 8
        walked = walk(step.program, step.costs)
        exposed_XR, idle_R = account(walked)
        np.testing.assert_allclose(exposed_XR.sum(axis=0) + idle_R, walked.seconds, rtol=1e-12)
    batch = next(stage.decode_batches())
    parts, inner = stage.parts(batch), stage.forward._stage
    assert sum(len(piece.rows_B) for piece, _ in parts) == 16
    whole = [inner.price([part]) for part in parts]
    mine = stage.forward.price(parts)
    for name in ("attention", "experts", "dispatch", "dense", "head"):
        each = [
            sum(c.seconds_NR[n].sum() for n, op in enumerate(inner.program.operations) if op.name == name)
            for c in whole
        ]
        ours = sum(mine.seconds_NR[n].sum() for n, op in enumerate(stage.forward.program.operations) if op.name == name)
        assert ours == pytest.approx(sum(each))


def test_a_balanced_belt_has_no_bubble_and_sends_between_stages_alone():
    base = small_scenario(nodes=1, per_node=4, layers=8, requests=64, outputs=3, dense_first=False, latency=1e-6)
    base = dataclasses.replace(base, trace=even_trace(8, 8, 2))
    belt = on_a_belt(base, 2, 2)
    step = list(Iterations(belt))[-1]
    walked = walk(step.program, step.costs)
    _, idle_R = account(walked)
    busy = walked.seconds - idle_R
    head_s = max(step.costs.seconds_NR[n].max() for n, op in enumerate(walked.operations) if op.name == "head")
    assert busy[2:].min() > 0.98 * walked.seconds  # the last stage, which has the head
    assert idle_R[:2].max() <= 2 * head_s + 0.02 * walked.seconds
    assert walked.seconds == pytest.approx(steps(belt)[-1][1].seconds)
    played, arrays = simulate(belt, timeline=2).metrics, estimate(belt).metrics  # operation by operation, and arrays
    assert {name: pytest.approx(value) for name, value in played.items()} == arrays
    sends = [n for n, op in enumerate(walked.operations) if op.name == "send"]
    assert (step.costs.bytes_NR[sends, :2] > 0).all() and (step.costs.bytes_NR[sends, 2:] == 0).all()


def test_what_a_pipeline_is_not_modelled_with_is_told():
    base = small_scenario(nodes=2, per_node=4, layers=6, requests=16)
    belt = on_a_belt(base, 2, 4)
    for changed, said in (
        (with_policies(belt, two_batch_overlap=True), "together with policies.two_batch_overlap"),
        (with_workload(belt, num_speculative_tokens=1), "together with workload.num_speculative_tokens"),
        (with_workload(belt, num_requests=4), "8 would do"),
        (on_a_belt(base, 8, 1), "pp = 8 stages for the 6 layers of small"),
        (on_a_belt(base, 3, 4), "pp = 3 times dp x cp x tp must equal the 8 devices"),
    ):
        assert any(said in mistake for mistake in changed.mistakes()), (said, changed.mistakes())
    assert belt.memory_bytes()["experts"] == pytest.approx(
        base.memory_bytes()["experts"], rel=0.5)  # half the layers, twice the experts of a rank  # fmt: skip
