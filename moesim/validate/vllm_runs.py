"""Real vLLM runs request by request: simulated at the prices of vLLM's own layers, one constant fitted to one run.

The constant is what the host adds to an iteration. Everything else is measured (layers), stated with the run (engine
arguments, KV blocks, LLMServingSim's link between devices) or computed (scheduling, KV cache, routing). Runs other than
the fitted one are judged; one of experts on several ranks, whose answer is not at hand, is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.files.requests.read import read_traffic
from moesim.files.runs_vllm import VllmRun, read_vllm_runs
from moesim.routing.trace import RoutingTrace
from moesim.service import EngineConfig
from moesim.validate.cases import Case, Validation
from moesim.validate.vllm_setups import Setup, latencies_s, setup_of

Floats = NDArray[np.float64]

HOST_S = np.linspace(0.0, 3e-3, 31)
"""Seconds of the host in an iteration that are tried."""
FIT_ON = "RTXPRO6000/Llama-3.1-8B"
"""The run that tells the host's seconds best: short iterations, and neither preemptions nor collectives in them."""
FIGURES = {"TTFT mean": "TTFT Mean", "TTFT p90": "TTFT P90", "TPOT mean": "TPOT Mean", "TPOT p90": "TPOT P90",
           "E2E mean": "Latency Mean", "E2E p90": "Latency P90"}  # fmt: skip
"""Ours -> LLMServingSim's name of it."""
AIMS = {"TPOT mean": 0.05, "TTFT mean": 0.12}
"""Most relative error that is aimed at."""
MOE_RUN = "RTXPRO6000/Qwen3-30B-A3B-Instruct-2507"
WORKLOAD = "workloads/sharegpt-qwen3-30b-a3b-300-sps10.csv"
MOE_ENGINE = EngineConfig(
    data_parallel_size=2, enable_expert_parallel=True, max_num_seqs=128, max_num_batched_tokens=2048
)
"""How LLMServingSim ran it, by the folder's own description."""


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
    folder: Path,
    fit_on: str = FIT_ON,
    trace: RoutingTrace | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Validation:
    """Judge the dense runs by the constant that one of them gives, and predict the run of experts.

    Args:
        folder: LLMServingSim's, with bench, profiler and workloads.
        trace: routing that the experts' requests replay, of any shape; nothing is predicted without it, or without the
            workload in the folder.
        report: takes a line of progress.

    Returns:
        Cases of each run, with LLMServingSim's predictions for baselines.

    Raises:
        ValueError: no run has the name `fit_on`, fewer than two dense runs are there, or a file has mistakes.
    """
    dense = [run for run in read_vllm_runs(folder) if not run.engine.enable_expert_parallel]
    names = [run.name for run in dense]
    if fit_on not in names or len(dense) < 2:
        raise ValueError(f"{folder}: must have the run to fit on and another dense one, asked for {fit_on!r}, given "
                         f"{', '.join(names) or 'none'}; name one of them")  # fmt: skip
    swept = []
    for run in dense:
        report(f"{run.name}: simulating it with {len(HOST_S)} values of the host's seconds")
        swept.append(Swept.of(run, setup_of(folder, run.device, run.model, run.engine, run.requests, run.link)))
    at = next(each for each in swept if each.run.name == fit_on).fitted()
    cases = [case for each in swept for case in _cases(each, swept, at, fit_on)]
    facts = {
        "fitted": f"host: {HOST_S[at] * 1e3:.1f} ms an iteration, to mean TTFT and TPOT of {fit_on} alone",
        "fitted to each run instead": ", ".join(f"{s.run.name} {HOST_S[s.fitted()] * 1e3:.1f} ms" for s in swept),
        "greatest error, whichever run is fitted to": _greatest(swept),
        "baseline": "LLMServingSim's own prediction of the same run",
    }
    if trace is not None and (folder / WORKLOAD).is_file():
        report(f"{MOE_RUN}: predicting it")
        cases += _predicted(folder, dense, float(HOST_S[at]), crossed_residuals(swept), trace)
        facts[f"predicted: {MOE_RUN}"] = (
            f"DP2 + EP, {WORKLOAD}, max_num_seqs 128, max_num_batched_tokens 2048, allgather_reducescatter over "
            f"LLMServingSim's link, routing like {trace.name}; the host's seconds as fitted; no measurement is at hand"
        )
    return Validation("vllm-runs", tuple(cases), facts)


def verdict(case: Case) -> str:
    """Whether a case meets its aim: "agrees" or "differs"; its interval where nothing was measured."""
    if case.measured is None:
        return f"{case.low:.4g} to {case.high:.4g}"
    aim = next((most for name, most in AIMS.items() if case.case.endswith(name)), None)
    if aim is None or case.fitted or case.error is None:
        return ""
    return f"{'agrees' if abs(case.error) <= aim else 'differs'} (aim {aim:.0%})"


def _greatest(swept: Sequence[Swept]) -> str:
    """The worst of all pairs of a fitted and a judged run."""
    found = crossed_residuals(swept)
    return ", ".join(f"{name} {max(abs(np.expm1(-ratio)) for ratio in found[name]):.1%}" for name in AIMS)


def _predicted(
    folder: Path, dense: Sequence[VllmRun], host_s: float, residuals: Mapping[str, Sequence[float]], trace: RoutingTrace
) -> list[Case]:
    """The run of experts, between the ends of what dense runs were wrong by."""
    device, _, name = MOE_RUN.partition("/")
    link = next((run.link for run in dense if run.device == device), dense[0].link)
    setup = setup_of(folder, device, f"Qwen/{name}", MOE_ENGINE, read_traffic(folder / WORKLOAD).requests, link, trace)
    cases = []
    for figure, seconds in figures(latencies_s(setup.simulate(host_s))).items():
        low, high = ends(residuals[figure])
        cases.append(Case(f"{MOE_RUN} {figure}", None, seconds, seconds * low, seconds * high, group=MOE_RUN))
    return cases


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
