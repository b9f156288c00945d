"""Small made-up models, machines and scenarios that many tests share; which tests a worker runs."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx

from moesim.hardware import Cluster, Device, Efficiency, Link, MemoryTier
from moesim.layout import AttentionGrid, ExpertGrid, Layout
from moesim.mixers import Attention
from moesim.model import Dense, Experts, Layer, ModelSpec
from moesim.policies import Policies
from moesim.routing.synthetic import zipf_trace
from moesim.scenario import Scenario
from moesim.workload import Workload

ENGINE = (
    "arrivals", "deployments", "queueing", "requests", "service_run", "serving_engine", "serving_simulated",
    "vllm_runs",
)  # fmt: skip
"""Files of tests that compile the engine of serving, which takes a minute."""


def pytest_xdist_make_scheduler(config, log):
    """With --dist loadgroup: one worker compiles the engine, once, while the other begins with all other files."""
    from xdist.scheduler import LoadScopeScheduling

    class OneCompiler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "engine" if file in {f"tests/test_{name}.py" for name in ENGINE} else file

    return OneCompiler(config, log) if config.getvalue("dist") == "loadgroup" else None


HALF = Efficiency(0.5, 0.4, 0.6, "assumed")


def small_model(layers=3, experts=8, top_k=2, heads=8, dense_first=True, shared=0) -> ModelSpec:
    mixer = Attention(heads, heads, 16)
    routed = Experts((64,) * experts, top_k, shared_width=shared)
    stack = tuple(Layer(mixer, Dense(256) if dense_first and i == 0 else routed) for i in range(layers))
    return ModelSpec("small", 128, 1000, stack)


def small_cluster(nodes=1, per_node=4, rate=1.0, latency=1.0) -> Cluster:
    """Rates times `rate`, latencies times `latency`."""
    kinds = ("gemm", "grouped_gemm", "attention", "memory", "network")
    gpu = Device(
        "gpu",
        "gpu",
        MemoryTier(1e10, 1e11 * rate),
        {"bf16": 1e13 * rate},
        2e-6 * latency,
        100.0,
        dict.fromkeys(kinds, HALF),
    )
    graph = nx.Graph()
    for n in range(nodes):
        for i in range(per_node):
            graph.add_edge(f"n{n}/gpu{i}", f"n{n}/nvswitch0", link=Link(1e10 * rate, 1e-6 * latency))
            graph.add_edge(f"n{n}/gpu{i}", f"n{n}/host0", link=Link(2e9 * rate, 3e-6 * latency))
            graph.add_edge(f"n{n}/gpu{i}", f"leaf{i}", link=Link(1e9 * rate, 5e-6 * latency))
    near = replace(
        gpu, name="near", kind="near_data", memory=MemoryTier(1e10, 2e11 * rate), flops_per_s={"bf16": 1e12 * rate}
    )
    return Cluster("small", gpu, nodes, per_node, graph, gpu, 1, near)


def small_scenario(
    nodes=1, per_node=4, spread=True, tp=1, rate=1.0, latency=1.0, seed=0, fraction=1.0, policies=None,
    requests=8, outputs=4, prompts=5, redundant=0, **model,
) -> Scenario:  # fmt: skip
    spec = small_model(**model)
    ranks = nodes * per_node
    experts = ExpertGrid(ep=ranks) if spread else ExpertGrid(edp=ranks // tp, etp=tp)
    routed = spec.experts
    trace = zipf_trace(
        len(spec.moe_layers), routed.num_experts, routed.top_k, num_requests=requests, prompt_tokens=prompts,
        output_tokens=outputs, seed=seed,
    )  # fmt: skip
    return Scenario(
        "small", spec, small_cluster(nodes, per_node, rate, latency),
        Layout(AttentionGrid(ranks // tp, tp), experts, redundant), Workload(requests, outputs), trace,
        Policies(**(policies or {}), device_expert_fraction=fraction), seed=seed,
    )  # fmt: skip
