"""Real vLLM runs request by request: simulated at the prices of vLLM's own layers, one constant fitted to one run.

The constant is what the host adds to an iteration. Everything else is measured (layers), stated with the run (engine
arguments, KV blocks, LLMServingSim's link between devices) or computed (scheduling, KV cache, routing). Runs other than
the fitted one are judged; one of experts on several ranks, whose answer is not at hand, is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.costs.compute import efficiency
from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.profiles.llmservingsim import LayerProfile, read_layer_profile
from moesim.files.requests.read import read_traffic
from moesim.files.runs_vllm import VllmRun
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
from moesim.validate.cases import Case, Validation
from moesim.validate.wide_ep import routing_like

Floats = NDArray[np.float64]

MACHINES = {"RTX4090": "workstation-4090", "RTXPRO6000": "rtx-pro-6000-x2"}
"""LLMServingSim's devices, as machines of ours."""
HOST_S = np.linspace(0.0, 3e-3, 31)
"""Seconds of the host in an iteration that are tried."""
FIT_ON = "RTX4090/Llama-3.1-8B"
"""The run that the host's seconds are fitted to: the one that says how many KV blocks it had."""
FIGURES = {"TTFT mean": "TTFT Mean", "TTFT p90": "TTFT P90", "TPOT mean": "TPOT Mean", "TPOT p90": "TPOT P90",
           "E2E mean": "Latency Mean", "E2E p90": "Latency P90"}  # fmt: skip
"""Ours -> LLMServingSim's name of it."""
AIMS = {"TPOT mean": 0.05, "TTFT mean": 0.12}
"""Most relative error that is aimed at."""


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


def figures(latencies: Mapping[str, Floats]) -> dict[str, float]:
    """The figures of `FIGURES`."""
    of: dict[str, Callable[[Floats], float]] = {
        "mean": lambda s_Q: float(s_Q.mean()), "p90": lambda s_Q: float(np.percentile(s_Q, 90)),
    }  # fmt: skip
    return {name: of[name.split()[1]](latencies[name.split()[0]]) for name in FIGURES}


def measured(run: VllmRun) -> dict[str, float]:
    """Figures of a run as it was."""
    return figures({"TTFT": run.ttft_s_Q, "TPOT": run.tpot_s_Q, "E2E": run.e2e_s_Q})


@dataclass(frozen=True, eq=False)
class Swept:
    """One run at every `HOST_S`: figure -> seconds, [len(HOST_S)]; and as it was."""

    run: VllmRun
    predicted: Mapping[str, Floats]
    measured: Mapping[str, float]

    @classmethod
    def of(cls, run: VllmRun, setup: Setup) -> Swept:
        """Simulate them all."""
        found = [figures(latencies_s(setup.simulate(float(host_s)))) for host_s in HOST_S]
        return cls(run, {name: np.array([each[name] for each in found]) for name in FIGURES}, measured(run))

    def log_ratio(self, name: str, at: int) -> float:
        """log(measured / predicted)."""
        return float(np.log(self.measured[name] / self.predicted[name][at]))

    def fitted(self) -> int:
        """Which of `HOST_S` comes nearest in mean TTFT and TPOT: least squares of log ratios."""
        errors = [sum(self.log_ratio(name, at) ** 2 for name in AIMS) for at in range(len(HOST_S))]
        return int(np.argmin(errors))


def crossed_residuals(swept: Sequence[Swept]) -> dict[str, list[float]]:
    """Log ratios of each figure, each run predicted by the constant of each other one."""
    pairs = [(fit.fitted(), judged) for fit in swept for judged in swept if judged is not fit]
    return {name: [judged.log_ratio(name, at) for at, judged in pairs] for name in FIGURES}


def ends(residuals: Sequence[float]) -> tuple[float, float]:
    """Factors that span all residuals, and none: there are too few of them for quantiles."""
    return float(np.exp(min([0.0, *residuals]))), float(np.exp(max([0.0, *residuals])))


def validate_vllm_runs(
    folder: Path, runs: Sequence[VllmRun], fit_on: str, report: Callable[[str], None] = lambda line: None
) -> tuple[Validation, float, dict[str, list[float]]]:
    """Judge the dense runs by the constant that one of them gives.

    Returns:
        The validation (baselines are LLMServingSim's predictions), the host's seconds, and the residuals of all pairs
        of a fitted and a judged run.

    Raises:
        ValueError: no run has the name `fit_on`, or fewer than two dense runs are there.
    """
    dense = [run for run in runs if not run.engine.enable_expert_parallel]
    if fit_on not in [run.name for run in dense] or len(dense) < 2:
        raise ValueError(f"{folder}: the fit needs {fit_on} and one more dense run, given {[r.name for r in dense]}")
    swept = []
    for run in dense:
        report(f"{run.name}: simulating it with {len(HOST_S)} values of the host's seconds")
        swept.append(Swept.of(run, setup_of(folder, run.device, run.model, run.engine, run.requests, run.link)))
    at = next(each for each in swept if each.run.name == fit_on).fitted()
    cases = [case for each in swept for case in _cases(each, swept, at, fit_on)]
    facts: dict[str, Any] = {
        "fitted": f"host: {HOST_S[at] * 1e3:.1f} ms an iteration, to mean TTFT and TPOT of {fit_on} alone",
        "by other runs": ", ".join(f"{each.run.name} {HOST_S[each.fitted()] * 1e3:.1f} ms" for each in swept),
        "baseline": "LLMServingSim's own prediction of the same run",
    }
    return Validation("vllm-runs", tuple(cases), facts), float(HOST_S[at]), crossed_residuals(swept)


def _cases(each: Swept, swept: Sequence[Swept], at: int, fit_on: str) -> list[Case]:
    """All figures of a run, with an interval from the other runs alone."""
    others = crossed_residuals([other for other in swept if other is not each])
    cases = []
    for name, theirs in FIGURES.items():
        predicted = float(each.predicted[name][at])
        low, high = ends(others[name])
        cases.append(
            Case(
                f"{each.run.name} {name}", each.measured[name], predicted, predicted * low, predicted * high,
                each.run.name == fit_on, each.run.name, each.run.theirs_s.get(theirs),
            )
        )  # fmt: skip
    return cases
