"""Weights streamed from host memory: the model of MoE-Lens, and what holds for every way of batching."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import small_scenario
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.costs.streaming import Streams, generation_bound, saturating_tokens, tokens_through
from moesim.estimate import estimate
from moesim.files.models import load_model
from moesim.files.scenarios import load_scenarios
from moesim.policies import SYSTEMS
from moesim.policies.batching import BATCHINGS, Job

MIXTRAL = load_model("mixtral-8x7b")
A40 = Streams(
    MIXTRAL.weight_bytes, MIXTRAL.kv_bytes_per_token, 2 * MIXTRAL.num_active_params, 19.5e9, 97e12, 100e9, 400e9
)
jobs = st.builds(Job, st.floats(10, 2000), st.floats(10, 2000), st.floats(1, 500))


def test_the_bound_of_moe_lens():
    """Its own figures: Mixtral on an A40 over 19.5 GB/s, 18,236 tokens in a step, MTBench and RAG."""
    assert pytest.approx(4.8, rel=0.01) == A40.streaming_s
    assert saturating_tokens(150e12, 32e9, 8, 2) == pytest.approx(19.2e3, rel=0.03)
    for kv_bytes, bounds in ((70e9, (931, 852, 684, 490)), (210e9, (931, 1495, 2052, 1471))):
        for answer, bound in zip((32, 64, 128, 256), bounds, strict=True):
            assert generation_bound(A40, 98, answer, kv_bytes, 18236) == pytest.approx(bound, rel=0.01)
    for kv_bytes, bound in ((70e9, 112), (210e9, 336)):
        assert generation_bound(A40, 926, 128, kv_bytes, 18236) == pytest.approx(bound, rel=0.01)


def test_tokens_through_a_memory_by_hand():
    """One request of 3 and 2 tokens is in memory for 2 steps with 4 tokens on average, and brings 5."""
    assert tokens_through(3, 2) == pytest.approx(5 / (2 * 4))


@settings(max_examples=40, deadline=None)
@given(jobs, st.sampled_from(sorted(set(BATCHINGS) - {"given"})))
def test_a_plan_keeps_the_memory_and_is_never_faster_than_link_and_gpu(job, name):
    plan = BATCHINGS[name]().plan(A40, job)
    assert plan.sequences > 0 and 0 <= plan.cpu_share <= 1
    if not plan.kv_on_gpu:
        assert plan.sequences * job.context * A40.kv_bytes <= A40.host_bytes - A40.weight_bytes + 1
    rate = plan.tokens_per_s(A40, job, counts_prefill=False)
    assert rate <= plan.sequences / A40.streaming_s * (1 + 1e-9)
    assert rate <= A40.gpu_flops_per_s / A40.flops * (1 + 1e-9)
    assert plan.tokens_per_s(A40, job) <= rate * (1 + 1e-9)
    slower = replace(A40, link_bytes_per_s=A40.link_bytes_per_s / 2)
    assert plan.tokens_per_s(slower, job) <= plan.tokens_per_s(A40, job) * (1 + 1e-9)
    more = replace(plan, sequences=plan.sequences * 2)
    assert more.tokens_per_s(A40, job) >= plan.tokens_per_s(A40, job) * (1 - 1e-9), "weights serve more sequences"


@settings(max_examples=20, deadline=None)
@given(jobs)
def test_the_best_share_of_the_cpu_is_never_worse_than_a_fixed_one(job):
    best, none = (BATCHINGS[name]().plan(A40, job) for name in ("module_level", "module_level_gpu"))
    assert best.tokens_per_s(A40, job, False) >= none.tokens_per_s(A40, job, False)


STREAMING = [name for name, policies in SYSTEMS.items() if "batching" in policies]
FILE = """
model = "mixtral-8x7b"
hardware = "workstation-a5000"
trace = "zipf:0.5"
policies = "{system}"
[workload]
num_requests = {requests}
prompt_tokens = 512
output_tokens = 256
"""


def streamed(folder, system, requests=5000):
    path = folder / "box.toml"
    path.write_text(FILE.format(system=system, requests=requests))
    return load_scenarios(path)[0]


@pytest.mark.parametrize("system", STREAMING)
def test_a_scenario_streams_at_what_its_link_gives(tmp_path, system):
    """3/4 of 32 GB/s, 93 GB of weights: no token comes sooner than they do, and no batch is larger than asked for."""
    scenario = streamed(tmp_path, system)
    found = estimate(scenario).metrics
    link = scenario.cluster.host_link.bytes_per_s * scenario.cluster.device.efficiency["network"].value
    assert found["tpot_s"] >= scenario.model.weight_bytes / link * (1 - 1e-9)
    assert found["output_tokens_per_s"] == pytest.approx(found["requests_per_iteration"] / found["tpot_s"])
    assert max(found[f"{unit}_busy_fraction"] for unit in ("host_link", "device", "cpu")) <= 1 + 1e-9
    assert 1 <= found["requests_per_iteration"] <= 5000
    few = estimate(streamed(tmp_path, system, 3)).metrics
    assert few["requests_per_iteration"] == 3 and few["output_tokens_per_s"] < found["output_tokens_per_s"]
    assert found["e2e_s"] >= 256 * found["tpot_s"]


def test_batching_by_module_gives_more_than_by_model_as_published(tmp_path):
    """MoE-Gen's order (arXiv 2503.09716, table 6): with the CPU, then without, then one batch for the model."""
    rate = {name: estimate(streamed(tmp_path, name)).metrics["output_tokens_per_s"] for name in STREAMING}
    assert rate["moe_gen"] > 2 * rate["moe_gen_gpu"] > 2 * rate["zero_inference"]
    assert rate["moe_lens"] >= rate["moe_gen"] >= rate["moe_lightning"] * (1 - 1e-9)


def test_streaming_needs_one_device_and_its_host():
    away = small_scenario(per_node=2, spread=False, policies={"batching": "module_level"})
    assert any("streams weights to one device" in mistake for mistake in away.mistakes())
