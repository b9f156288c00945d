"""Real serving runs through the full simulator: a closed loop of each run's concurrency, constants of other groups.

The closed form of `moesim.validate.serving` prices one decode iteration. Here requests come, wait, are cut in chunks
and leave, with the same constants (all but `prefill_factor`, which stands for what is played here). Lengths are even
between 0.8 and 1 of the nominal ones where their mean is 0.9, as the recipes say.

The benchmark sends 10 x concurrency requests, as many as there are clients at once, and counts them all
(github.com/InferenceMAX/InferenceMAX: --num-prompts $((CONC * 10)) --request-rate inf), so that its time to the first
token holds the queue of its start. TTFT here is of the same requests; TTFT-steady and TPOT leave a warm-up out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.calibrate.folds import hold_out, quantiles
from moesim.calibrate.measured import Measured, preferred
from moesim.calibrate.serving import (
    MakeKernels,
    cluster_of,
    price_runs,
    quantised,
    roofline_kernels,
    tokens_per_iteration,
)
from moesim.costs.calibration import NAMES, Calibration, Floats
from moesim.costs.measured import MeasuredTables
from moesim.files.models import load_model
from moesim.files.runs import Run
from moesim.files.scenarios import made_up_trace
from moesim.fleet import Fleet
from moesim.model import ModelSpec
from moesim.requests import Requests
from moesim.routing.synthetic import even_trace
from moesim.routing.trace import RoutingTrace
from moesim.service import EngineConfig, Service
from moesim.simulate.serving import simulate_service
from moesim.validate.cases import Case, Validation

ROUNDS, WARM_UP = 12, 4
"""Requests of a run, and those of them at its beginning that are not counted, in multiples of its concurrency: all are
sent at once at first, and it takes some rounds until prompts come one by one."""
BENCHMARK = 10
"""Requests that the benchmark sends and counts, in multiples of the concurrency."""
COUNTED = 32
"""Requests after the warm-up, at least."""
MAX_TOKENS = 8192
"""Of an iteration: --max-num-batched-tokens of the benchmark's vLLM servers, taken for the others too."""
FIGURES = ("TPOT", "TTFT", "TTFT-steady")
SKEWED = "zipf:0.5"
"""Routing beside measured tables, whose experts are loaded by a power law."""
NO_TABLES = MeasuredTables()
_EVERY = 20


@dataclass(frozen=True)
class Simulated:
    """Means, seconds; `ttft_s` of the requests that the benchmark counts, the others of those after the warm-up."""

    tpot_s: float
    ttft_s: float
    steady_ttft_s: float

    def of(self, figure: str) -> float:
        """One of `FIGURES`."""
        return dict(zip(FIGURES, (self.tpot_s, self.ttft_s, self.steady_ttft_s), strict=True))[figure]


def left_out(run: Run) -> str:
    """Why a run is not simulated; "" where it is."""
    if run.is_disaggregated:
        return "prompts computed elsewhere, by instances whose number is not recorded"
    if run.dp > 1 and run.ep != run.dp * run.tp:
        return "experts cut across data-parallel ranks, which engines here do not do"
    return ""


def service_of(
    run: Run, values: Floats, trace: RoutingTrace, rounds: int = ROUNDS, tables: MeasuredTables = NO_TABLES
) -> Service:
    """A run as a service with one instance in a closed loop; `values` of the constants, in the order of `NAMES`.

    Raises:
        ValueError: it does not fit the machine.
    """
    cluster, constants = cluster_of(run.system, run.dp * run.tp), dict(zip(NAMES, map(float, values), strict=True))
    model = _model(run)
    rng = np.random.default_rng(0)
    concurrency = max(math.ceil(run.concurrency / run.num_instances), 1)
    num = max(rounds * concurrency, WARM_UP * concurrency + COUNTED)
    least = 2 * run.length_fraction - 1
    prompt_Q, output_Q = (
        np.maximum(np.round(rng.uniform(least, 1, num) * length), 1)
        for length in (run.prompt_tokens, run.output_tokens)
    )
    requests = replace(Requests.of(np.zeros(num), prompt_Q, output_Q), concurrency=concurrency)
    drafts = run.num_draft_tokens
    tokens_N = tokens_per_iteration(
        np.array([float(drafts)]), np.array([output_Q.mean()]), constants["acceptance_rate"],
        constants["acceptance_gain"],
    )  # fmt: skip
    per_rank = math.ceil(concurrency / run.dp)
    engine = EngineConfig(
        tensor_parallel_size=run.tp, data_parallel_size=run.dp, enable_expert_parallel=run.ep > 1,
        max_num_seqs=run.max_requests_per_rank or per_rank, max_num_batched_tokens=MAX_TOKENS,
        enable_prefix_caching=False, num_speculative_tokens=drafts, acceptance_length=float(tokens_N[0]),
        routing="memoised", gpu_memory_utilization=0.95,
    )  # fmt: skip
    kernels = "measured tables" if tables.tables else "roofline"
    calibration = Calibration(constants, dict.fromkeys(NAMES, "fitted: other groups"), 1.0, 1.0, kernels, {})
    fleet = Fleet(num_instances=1, router="vllm_load")
    service = Service(
        run.name, model, cluster, trace, requests, engine, fleet=fleet, tables=tables, calibration=calibration
    )
    if mistakes := service.mistakes():
        raise ValueError(f"{run.name}: {'; '.join(mistakes)}")
    return service


def simulate_run(
    run: Run, values: Floats, trace: RoutingTrace, rounds: int = ROUNDS, tables: MeasuredTables = NO_TABLES
) -> Simulated:
    """Serve the requests of a run.

    Raises:
        ValueError: it does not fit the machine.
    """
    service = service_of(run, values, trace, rounds, tables)
    outcome = simulate_service(service)
    clients = service.requests.concurrency or 1
    ttft_s_Q = outcome.first_token_s_Q - outcome.arrival_s_Q
    tpot_s_Q = (outcome.finish_s_Q - outcome.first_token_s_Q) / np.maximum(outcome.generated_Q - 1, 1)
    begun, steady = slice(BENCHMARK * clients), slice(WARM_UP * clients, None)
    return Simulated(float(tpot_s_Q[steady].mean()), float(ttft_s_Q[begun].mean()), float(ttft_s_Q[steady].mean()))


def simulate_serving(
    runs: Sequence[Run],
    closed: Validation,
    make_kernels: MakeKernels | None = None,
    calibration: Calibration | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Validation]:
    """Simulate the runs, and compare seconds per output token, and to the first: a validation for each of `FIGURES`.

    Args:
        closed: what `validate_serving` found of the same runs.
        make_kernels: as there; where they are measured, the simulator takes them from the same tables.
        calibration: as there; None fits constants to the other groups for each.
        report: takes a line of progress.
    """
    if calibration:
        values = {run.group: np.array([calibration.values[name] for name in NAMES]) for run in runs}
    else:
        values = hold_out(price_runs(runs, make_kernels or roofline_kernels), [run.group for run in runs]).values
    found, reasons, traces = dict[int, Simulated](), list[str](), dict[str, RoutingTrace]()
    tables = dict[tuple[str, str], MeasuredTables]()
    for i, run in enumerate(runs):
        reason = left_out(run)
        if not reason:
            if run.model not in traces:
                traces[run.model] = _routing(run, "even" if make_kernels is None else SKEWED)
            if (here := (run.system, run.backend)) not in tables:
                tables[here] = _tables(run, make_kernels)
            try:
                found[i] = simulate_run(run, values[run.group], traces[run.model], tables=tables[here])
            except ValueError as error:
                reason = "no room on the machine"
                report(f"left out: {error}")
        reasons += [reason] if reason else []
        if i % _EVERY == 0:
            report(f"simulated {i + 1} of {len(runs)} runs")
    facts: dict[str, Any] = {
        "runs": f"{len(found)} of {len(runs)}, each a closed loop of {ROUNDS} x concurrency requests, of which the "
        f"first {WARM_UP} x are not counted (TTFT: the first {BENCHMARK} x are, as in the benchmark)",
        **{f"left out: {reason}": reasons.count(reason) for reason in dict.fromkeys(reasons)},
        **(_beside(runs, found, closed) if found else {}),
    }
    tpot, *others = (_cases(figure, runs, found, closed) for figure in FIGURES)
    judged = [tpot, *(_with_intervals(cases) for cases in others)]
    return [
        Validation(f"serving, simulated: {figure}", tuple(cases), said)
        for figure, cases, said in zip(FIGURES, judged, (facts, {}, {}), strict=True)
    ]


def _cases(figure: str, runs: Sequence[Run], found: Mapping[int, Simulated], closed: Validation) -> list[Case]:
    """One figure of all runs that have it, in an interval as wide as the closed form's."""
    cases = []
    for i, each in found.items():
        run, known, seconds = runs[i], closed.cases[i], each.of(figure)
        measured, plain = (run.tpot_s, known.baseline) if figure == "TPOT" else (run.ttft_s, None)
        low_s, high_s = (seconds * end / known.predicted for end in (known.low, known.high))
        if measured is not None:
            cases.append(Case(run.name, measured, seconds, low_s, high_s, known.fitted, run.group, plain))
    return cases


def _beside(runs: Sequence[Run], found: Mapping[int, Simulated], closed: Validation) -> dict[str, str]:
    """Beside the closed form, which was fitted; and what the time to the first token lacks."""
    ratio_N = np.array([each.tpot_s / closed.cases[i].predicted for i, each in found.items()])
    low, middle, high = np.percentile(ratio_N, [10, 50, 90]) - 1
    judged = [i for i in found if not closed.cases[i].fitted]
    said = {"TPOT, simulated over the closed form": f"median {middle:+.1%}, 10th {low:+.1%}, 90th {high:+.1%}"}
    if judged:
        errors = [abs(closed.cases[i].predicted / runs[i].tpot_s - 1) for i in judged]
        said["TPOT, closed form of the same runs"] = f"median error {np.median(errors):.1%}"
    lacking: dict[str, list[float]] = {}
    for i, each in found.items():
        if (seconds := runs[i].ttft_s) is not None:
            lacking.setdefault(runs[i].group, []).append(1e3 * (seconds - each.ttft_s))
    if lacking:
        said["TTFT, median of measured less simulated"] = ", ".join(
            f"{group} {np.median(ms):.0f} ms" for group, ms in lacking.items()
        )
    return said


def _with_intervals(cases: Sequence[Case]) -> list[Case]:
    """Ends of the 90 % interval of each group from the times to the first token of the other groups.

    (The constants of those were fitted to seconds per output token, this group's among them.)
    """
    logs = {c.case: math.log(c.measured / c.predicted) for c in cases if c.measured is not None and not c.fitted}
    result, known = [], dict[str, tuple[float, float]]()
    for case in cases:
        if case.group not in known:
            others = [c for c in cases if c.group != case.group and c.case in logs]
            sizes = [sum(c.group == other.group for c in others) for other in others]
            residuals = np.array([logs[c.case] for c in others])
            known[case.group] = quantiles(residuals, 1 / np.array(sizes, np.float64)) if others else (0.0, 0.0)
        low, high = known[case.group]
        result.append(replace(case, low=case.predicted * math.exp(low), high=case.predicted * math.exp(high)))
    return result


def _model(run: Run) -> ModelSpec:
    """The model with experts and cache in the run's formats."""
    model = quantised(load_model(run.model), run.expert_dtype)
    return replace(model, dtypes=replace(model.dtypes, kv=run.kv_dtype))


def _routing(run: Run, name: str) -> RoutingTrace:
    """Choices as the constants were fitted with: even on rooflines, skewed in tables."""
    model = load_model(run.model)
    return made_up_trace(model, name) if model.moe_layers else even_trace(0, 1, 1)


def _tables(run: Run, make_kernels: MakeKernels | None) -> MeasuredTables:
    kernels = make_kernels(cluster_of(run.system, run.dp * run.tp), run) if make_kernels else None
    return preferred(kernels.tables, run.backend) if isinstance(kernels, Measured) else NO_TABLES
