"""Runs of vLLM as services of ours, priced by the layers that LLMServingSim timed one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.costs.compute import efficiency
from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.profiles.llmservingsim import LayerProfile, read_layer_profile
from moesim.files.tables import raise_all
from moesim.fleet import Fleet
from moesim.hardware import Cluster, Link
from moesim.requests import Requests
from moesim.routing.synthetic import zipf_trace
from moesim.routing.trace import RoutingTrace
from moesim.service import EngineConfig, Service
from moesim.serving.instance import prices_of
from moesim.serving.measured_prices import measured_prices
from moesim.serving.outcome import Outcome
from moesim.serving.prices import Prices
from moesim.simulate.serving import simulate_service
from moesim.validate.wide_ep import routing_like

Floats = NDArray[np.float64]

MACHINES = {"RTX4090": "workstation-4090", "RTXPRO6000": "rtx-pro-6000-x2"}
"""LLMServingSim's devices, as machines of ours."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What is needed to simulate one run but the host's seconds: the service, and vLLM's layers."""

    service: Service
    profile: LayerProfile

    @cached_property
    def _prices(self) -> Prices:
        return prices_of(self.service, self.service.engine)

    def simulate(self, host_s: float) -> Outcome:
        """All requests served."""
        prices = measured_prices(self._prices, self.profile, self.service.model, host_s)
        return simulate_service(self.service, pricing=lambda service, engine, bound: prices)


def distinct_prefixes(requests: Requests, block_tokens: int) -> Requests:
    """The same requests, no two of which begin alike: a prompt then finds its own blocks again after a preemption."""
    start_Q = np.concatenate([np.zeros(1, np.int64), np.cumsum(requests.prompt_Q // block_tokens)])
    ids = np.arange(start_Q[-1], dtype=np.int64)
    return replace(requests, block_start_Q=start_Q, block_ids=ids, block_tokens=block_tokens)


def with_link(cluster: Cluster, link: Link) -> Cluster:
    """The machine of one node with all its links such that collectives reach `link`."""
    reached, topology = efficiency(cluster.device, "network", "value"), cluster.topology.copy()
    for start, end in topology.edges:
        topology.edges[start, end]["link"] = Link(link.bytes_per_s / reached, link.latency_s / 2)  # up and down
    return replace(cluster, topology=topology)


def setup_of(
    folder: Path, device: str, model: str, engine: EngineConfig, requests: Requests, link: Link,
    trace: RoutingTrace | None = None,
) -> Setup:  # fmt: skip
    """The set-up of a run in LLMServingSim's folder.

    Args:
        device, model: in the source's words.
        trace: whose routing is replayed, resampled to the model's shape; none for dense models.

    Raises:
        ValueError: a device, model or profile that is not known, or parts that break rules together.
    """
    if device not in MACHINES:
        raise ValueError(f"{folder}: device {device!r} is not known; one of {', '.join(MACHINES)} would do")
    profile = read_layer_profile(folder / "profiler" / "perf" / device / model / "bf16", engine.tensor_parallel_size)
    spec = load_model(model.rpartition("/")[2].lower().removesuffix("-instruct-2507"))
    engine = replace(engine, max_model_len=engine.max_model_len or spec.max_position)
    if engine.enable_prefix_caching:
        requests = distinct_prefixes(requests, engine.block_size)
    if trace is None:
        routing = zipf_trace(0, 1, 1, num_requests=1, prompt_tokens=1, output_tokens=1)
    else:
        routing = routing_like(trace, spec)
    cluster, fleet = with_link(load_cluster(MACHINES[device]), link), Fleet(num_instances=1, router="vllm_load")
    service = Service(f"{device}/{spec.name}", spec, cluster, routing, requests, engine, fleet=fleet)
    raise_all(f"{folder}: {service.name}", service.mistakes())
    return Setup(service, profile)


def latencies_s(outcome: Outcome) -> dict[str, Floats]:
    """TTFT, TPOT and E2E of each request."""
    sent_s_Q, first_s_Q, last_s_Q = outcome.arrival_s_Q, outcome.first_token_s_Q, outcome.finish_s_Q
    tpot_s_Q = (last_s_Q - first_s_Q) / np.maximum(outcome.generated_Q - 1, 1)
    return {"TTFT": first_s_Q - sent_s_Q, "TPOT": tpot_s_Q, "E2E": last_s_Q - sent_s_Q}
