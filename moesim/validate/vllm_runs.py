"""Real vLLM runs request by request: simulated at the prices of vLLM's own layers, one constant fitted to one run.

The constant is what the host adds to an iteration. Everything else is measured (layers), stated with the run (engine
arguments, KV blocks, LLMServingSim's link between devices) or computed (scheduling, KV cache, routing). Runs other than
the fitted one are judged; a run of experts on several ranks that is not at hand is predicted.
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
from moesim.costs.operators import Operators
from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.profiles.llmservingsim import LayerProfile, read_layer_profile
from moesim.files.runs_vllm import VllmRun
from moesim.hardware import Cluster, Link
from moesim.layout import AttentionGrid, ExpertGrid, Layout
from moesim.model import BYTES_PER_PARAM, ModelSpec
from moesim.requests import Requests
from moesim.routing.streams import streams
from moesim.routing.trace import RoutingTrace
from moesim.service import EngineConfig
from moesim.serving.alone import distinct_prefixes, serve_alone
from moesim.serving.measured_prices import measured_prices
from moesim.serving.prices import Prices
from moesim.serving.pricing import build_prices
from moesim.serving.state import Book, Rules
from moesim.validate.cases import Case, Validation

Floats = NDArray[np.float64]

MACHINES = {"RTX4090": "workstation-4090", "RTXPRO6000": "rtx-pro-6000-x2"}
"""LLMServingSim's devices, as machines of ours."""
HOST_S = np.linspace(0.0, 3e-3, 31)
"""Seconds of the host in an iteration that are tried."""
FIGURES = {"TTFT mean": "TTFT Mean", "TTFT p90": "TTFT P90", "TPOT mean": "TPOT Mean", "TPOT p90": "TPOT P90",
           "E2E mean": "Latency Mean", "E2E p90": "Latency P90"}  # fmt: skip
"""Ours -> LLMServingSim's name of it."""
AIMS = {"TPOT mean": 0.05, "TTFT mean": 0.12}
"""Most relative error that is aimed at."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What is needed to simulate one run but the host's seconds.

    link: between devices, as it is reached; trace: whose routing is replayed, none for dense models.
    """

    model: ModelSpec
    cluster: Cluster
    engine: EngineConfig
    profile: LayerProfile
    link: Link
    requests: Requests
    trace: RoutingTrace | None = None

    @cached_property
    def _prices(self) -> Prices:
        dp, tp = self.engine.data_parallel_size, self.engine.tensor_parallel_size
        spread = self.engine.enable_expert_parallel and dp * tp > 1
        layout = Layout(AttentionGrid(dp, tp), ExpertGrid(ep=dp * tp) if spread else ExpertGrid(edp=dp, etp=tp))
        machine = with_link(self.cluster, self.link)
        operators = Operators(machine.device)
        return build_prices(self.model, machine, layout, self.engine, self.trace, operators)

    def simulate(self, host_s: float) -> Book:
        """All requests served."""
        prices = measured_prices(self._prices, self.profile, self.model, host_s)
        requests = self.requests
        if self.engine.enable_prefix_caching:
            requests = distinct_prefixes(requests, self.engine.block_size)
        found = None
        if self.trace is not None:
            found = streams(self.trace, requests.topic_Q, np.random.default_rng(0))
        return serve_alone(requests, self._rules(requests), prices, self.engine.data_parallel_size, found)

    def _rules(self, requests: Requests) -> Rules:
        engine, has_prefixes = self.engine, len(requests.block_ids) > 0
        return Rules(
            engine.max_num_seqs, engine.max_num_batched_tokens, engine.enable_chunked_prefill, 0, False, False, False,
            False, engine.block_size, self.num_blocks, has_prefixes, requests.block_tokens, int(has_prefixes), 0, 0.0, 1,
            np.zeros(0), 1, np.array([np.inf]), self.trace is None,
        )  # fmt: skip

    @property
    def num_blocks(self) -> int:
        """KV blocks of a data-parallel group: as vLLM said, or what the weights leave of a device."""
        engine, model = self.engine, self.model
        if engine.num_gpu_blocks_override is not None:
            return engine.num_gpu_blocks_override
        weights = model.num_params * BYTES_PER_PARAM[model.dtypes.experts] / engine.num_ranks
        room = engine.gpu_memory_utilization * self.cluster.device.memory.capacity_bytes - weights
        return int(room / (model.kv_bytes_per_token / engine.tensor_parallel_size * engine.block_size))


def with_link(cluster: Cluster, link: Link) -> Cluster:
    """The machine of one node with all its links such that collectives reach `link`."""
    reached, topology = efficiency(cluster.device, "network", "value"), cluster.topology.copy()
    for start, end in topology.edges:
        topology.edges[start, end]["link"] = Link(link.bytes_per_s / reached, link.latency_s / 2)  # up and down
    return replace(cluster, topology=topology)


def setup_of(folder: Path, run: VllmRun, trace: RoutingTrace | None = None, model: str = "") -> Setup:
    """The setup of a run in LLMServingSim's folder.

    Raises:
        ValueError: a device, model or profile that is not known.
    """
    if run.device not in MACHINES:
        raise ValueError(f"{run.name}: device {run.device!r} is not known; one of {', '.join(MACHINES)}")
    variant = folder / "profiler" / "perf" / run.device / run.model / "bf16"
    profile = read_layer_profile(variant, run.engine.tensor_parallel_size)
    spec = load_model(model or run.model.rpartition("/")[2].lower())
    engine = run.engine if run.engine.max_model_len else replace(run.engine, max_model_len=spec.max_position)
    return Setup(spec, load_cluster(MACHINES[run.device]), engine, profile, run.link, run.requests, trace)


def latencies_s(book: Book) -> dict[str, Floats]:
    """TTFT, TPOT and E2E of each request."""
    tokens_Q = np.maximum(book.generated_Q - 1, 1)
    return {
        "TTFT": book.first_s_Q - book.sent_s_Q,
        "TPOT": (book.last_s_Q - book.first_s_Q) / tokens_Q,
        "E2E": book.finish_s_Q - book.sent_s_Q,
    }


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
        swept.append(Swept.of(run, setup_of(folder, run)))
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
