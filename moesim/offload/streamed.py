"""A scenario whose weights stream through the device in every step, for batches that a policy chooses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moesim.costs import compute
from moesim.costs.operators import Operators
from moesim.costs.streaming import Streams
from moesim.hardware import SOURCES
from moesim.offload.prices import host_bytes_per_s
from moesim.policies.batching import BATCHINGS, Job
from moesim.results import Record, Result
from moesim.scenario import Scenario
from moesim.version import __version__

PARTS = {"h2d": "streaming", "compute": "experts", "cpu": "cpu_attention", "host memory": "host_memory"}
"""Resource -> what it does in a step."""
BUFFERED = 2
"""Layers whose weights are on the device at once: one is computed while the next arrives."""


def streams_of(scenario: Scenario, bound: str = "value") -> Streams:
    """Model and machine as numbers. Rates are peaks times achieved fractions; the CPU reads caches as fast as memory
    gives them."""
    s, device = scenario, scenario.cluster.device
    assert s.cluster.host is not None
    memory = host_bytes_per_s(s.cluster, bound)
    copied_s = float(Operators(device, bound).host_copy(1e9, s.cluster).seconds)
    peak = compute.arithmetic_flops_per_s(device, s.model.dtypes.experts)
    return Streams(
        s.model.weight_bytes, s.model.kv_bytes_per_token, 2 * s.model.num_active_params, 1e9 / copied_s,
        peak * compute.efficiency(device, "grouped_gemm", bound), memory if s.cluster.host.flops_per_s else 1e-9,
        s.cluster.host_memory_bytes, memory,
    )  # fmt: skip


def job_of(scenario: Scenario) -> Job:
    """Its requests; the device holds the caches of so many, of all layers or of one at a time, beside the weights that
    are there."""
    s, model = scenario, scenario.model
    policy, num_layers = BATCHINGS[s.policies.batching], len(model.layers)
    prompt = s.workload.prompt_tokens
    if prompt is None:
        prompt = int(np.bincount(s.trace.request_T[~s.trace.is_decode_T]).mean())
    longest = prompt + s.workload.output_tokens
    room = s.cluster.device.memory.capacity_bytes - BUFFERED * model.weight_bytes / num_layers
    kv_bytes = longest * model.kv_bytes_per_token / (1 if policy.kv_on_gpu else num_layers)
    return Job(prompt, s.workload.output_tokens, max(1.0, float(np.floor(room / kv_bytes))))


def streamed(scenario: Scenario, bound: str, engine: str, timeline: int = 0) -> Result:
    """Run it: batches of the policy's size, one after another, until all requests are done.

    Args:
        bound, timeline: as of `moesim.estimate.estimate`; one decode step leaves its records, if any.
    """
    s, streams, job = scenario, streams_of(scenario, bound), job_of(scenario)
    plan = BATCHINGS[s.policies.batching]().plan(streams, job)
    requests = s.workload.num_requests
    served = float(np.clip(np.floor(plan.sequences), 1, requests))
    plan = replace(plan, sequences=served)
    busy_s = plan.busy_s(streams, job)
    step_s, limit = max(busy_s.values()), max(busy_s, key=lambda name: busy_s[name])
    prefill_s = plan.prefill_s(streams, job)
    batches = float(np.ceil(requests / served))
    rate = served / step_s
    metrics = {
        "output_tokens_per_s": rate,
        "output_tokens_per_s_per_device": rate,
        "tpot_s": step_s,
        "ttft_s": prefill_s or step_s,
        "prefill_tokens_per_s": rate * job.prompt / job.answer
        if plan.mixes_prompts
        else served * job.prompt / prefill_s,
        "e2e_s": requests * job.answer / plan.tokens_per_s(streams, job),
        "num_requests": float(requests),
        "num_prefill_iterations": 0.0 if plan.mixes_prompts else batches,
        "num_decode_iterations": batches * job.answer,
        "requests_per_iteration": served,
        "cpu_attention_fraction": plan.cpu_share,
        "host_link_busy_fraction": busy_s["h2d"] / step_s,
        "device_busy_fraction": busy_s["compute"] / step_s,
        "cpu_busy_fraction": busy_s["cpu"] / step_s,
    }
    host = s.cluster.host
    assert host is not None
    rests = {
        "h2d": compute.source(s.cluster.device, "network"), "compute": compute.source(s.cluster.device, "grouped_gemm"),
        "cpu": compute.source(host, "memory"), "host memory": compute.source(host, "memory"),
    }  # fmt: skip
    total = sum(busy_s.values())
    shares = {name: sum(busy_s[of] for of, x in rests.items() if SOURCES[x] == name) / total for name in SOURCES}
    breakdown = {"decode": {PARTS[limit]: step_s}}
    if prefill_s:
        breakdown["prefill"] = {PARTS["h2d" if prefill_s <= streams.streaming_s else "compute"]: prefill_s}
    kv_on_device = served * job.longest * streams.kv_bytes if plan.kv_on_gpu else 0.0
    return Result(
        name=s.name,
        scenario=s.plain,
        engine=engine,
        seed=s.seed,
        version=__version__,
        metrics=metrics,
        provenance={f"{name}_fraction": share for name, share in shares.items()},
        breakdown_s=breakdown,
        memory_bytes={
            "other_weights": BUFFERED * streams.weight_bytes / len(s.model.layers),
            "kv_cache": kv_on_device,
            "capacity": s.cluster.device.memory.capacity_bytes,
        },
        step_s=(step_s,) * s.workload.output_tokens,
        records=tuple(
            Record(PARTS[unit], "decode", 0, -1, 0, unit, 0.0, seconds, 0.0)
            for unit, seconds in busy_s.items()
            if timeline and seconds
        ),
        warnings=tuple(s.warnings()),
    )
