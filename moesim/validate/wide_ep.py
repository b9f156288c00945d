"""Wide expert parallelism: two constants fitted to DeepSeek's H800 profile, everything else predicted.

The constants are how much longer computation takes than on its rooflines (fitted to the prefill), and how many launches
stand behind each one that is counted (fitted to the decoding): norms, rotations and quantisation are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from moesim.costs.calibration import CONSTANTS, Calibration
from moesim.costs.operators import Operators
from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.layout import AttentionGrid, ExpertGrid, Layout
from moesim.model import Dtypes, ModelSpec
from moesim.policies import Policies
from moesim.policies.collective import LowLatency
from moesim.program.iterations import Iterations
from moesim.program.walk import walk
from moesim.routing.generator import Shape, fit_generator
from moesim.routing.synthetic import even_trace
from moesim.routing.trace import RoutingTrace
from moesim.scenario import Scenario
from moesim.validate.cases import Case, Validation
from moesim.validate.wide_ep_setups import BUS, LEVERS, SETUPS, Setup
from moesim.workload import Workload

MODEL = "deepseek-v3"
KERNELS, LAUNCHES = ("gemm_factor", "attention_factor", "experts_factor"), "launch_factor"
ROUNDS = 4
"""Of fitting one constant, then the other: each hardly moves the other's row."""
LEAST_ERROR = 0.1
"""An interval is no narrower than this, however well the fitted row was met before the fit."""


def routing_like(trace: RoutingTrace, model: ModelSpec, num_requests: int = 128, seed: int = 0) -> RoutingTrace:
    """Routing of the model's shape with the statistics of a trace; the trace itself where it has that shape."""
    ffn = model.experts
    shape = Shape(len(model.moe_layers), ffn.num_experts, ffn.top_k)
    if Shape.of(trace) == shape:
        return trace
    made = fit_generator(trace, seed=seed).sample(
        num_requests, prompt_tokens=(512, 512), output_tokens=(256, 256), shape=shape, seed=seed
    )
    parts = list(made)

    def joined(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    return replace(
        parts[0], name=f"like {trace.name}", expert_ids_TLK=joined("expert_ids_TLK"), request_T=joined("request_T"),
        position_T=joined("position_T"), is_decode_T=joined("is_decode_T"), token_id_T=None, weights_TLK=None,
        scores_TLE=None, predicted_HTLW=(),
    )  # fmt: skip


def scenario_of(setup: Setup, model: ModelSpec, traces: Mapping[str, RoutingTrace]) -> Scenario:
    """The set-up as a scenario of one iteration.

    Raises:
        ValueError: it cannot run, such as for want of memory.
    """
    cluster = load_cluster(setup.hardware)
    if setup.dtype:
        model = replace(model, dtypes=Dtypes(*(setup.dtype,) * 3, *("bf16",) * 3))
    is_prefill, ranks = setup.phase == "prefill", cluster.num_ranks
    prompt = setup.length if is_prefill else setup.length - 1
    layout = Layout(AttentionGrid(dp=ranks), ExpertGrid(ep=ranks), setup.redundant, setup.shared_ranks)
    tokens = setup.requests * prompt if is_prefill else 1
    workload = Workload(setup.requests * ranks, 2, prompt, tokens, setup.drafts, setup.acceptance)
    all_to_all = "rails" if is_prefill and cluster.num_nodes > 1 else "low_latency"
    policies = Policies(setup.placement, all_to_all=all_to_all, two_batch_overlap=setup.overlap)
    scenario = Scenario(setup.name, model, cluster, layout, workload, traces[setup.routing], policies)
    scenario = replace(scenario, calibration=_calibration({}))
    if mistakes := scenario.mistakes():
        raise ValueError(f"{setup.name}: " + "; ".join(mistakes))
    return scenario


def _calibration(values: Mapping[str, float]) -> Calibration:
    neutral = {constant.name: 1.0 for constant in CONSTANTS} | {"iteration_overhead_s": 0.0, "acceptance_rate": 0.0}
    return Calibration(neutral | dict(values), {}, 1.0, 1.0, "roofline", {})


@dataclass(frozen=True, eq=False)
class Prepared:
    """A set-up whose tokens are counted, so that it can be priced again and again."""

    setup: Setup
    scenario: Scenario
    price: Callable[..., float]

    @classmethod
    def of(cls, setup: Setup, model: ModelSpec, traces: Mapping[str, RoutingTrace]) -> Prepared:
        """Count one iteration."""
        scenario = scenario_of(setup, model, traces)
        steps = Iterations(scenario)
        batch = next(steps.prefill_batches() if setup.phase == "prefill" else steps.decode_batches())
        parts, forward, device = steps.parts(batch), steps.forward, scenario.cluster.device

        def price(values: Mapping[str, float], bound: str = "value") -> float:
            operators = partial(Operators, device, calibration=_calibration(values))
            return walk(forward.program, forward.price(parts, bound, operators)).seconds

        return cls(setup, scenario, price)

    def tokens_per_s(self, seconds: float) -> float:
        """Of one accelerator, for an iteration of so long."""
        setup = self.setup
        gained = setup.length if setup.phase == "prefill" else self.scenario.workload.tokens_per_decode
        return setup.per * setup.requests * gained / seconds


def fit(prefill: Prepared, decode: Prepared) -> dict[str, float]:
    """The two constants with which both rows come out as reported."""
    values = {**dict.fromkeys(KERNELS, 1.0), LAUNCHES: 1.0}
    for _ in range(ROUNDS):
        for prepared, names in ((prefill, KERNELS), (decode, (LAUNCHES,))):
            assert prepared.setup.reported is not None
            wanted_s = prepared.tokens_per_s(prepared.setup.reported)  # its own inverse
            low, high = 0.1, 30.0
            for _ in range(20):
                middle = float(np.sqrt(low * high))
                values |= dict.fromkeys(names, middle)
                low, high = (middle, high) if prepared.price(values) < wanted_s else (low, middle)
    return values


def validate_wide_ep(
    trace: RoutingTrace, setups: Sequence[Setup] = SETUPS, report: Callable[[str], None] = lambda line: None
) -> Validation:
    """Predict every set-up with the constants fitted to those of DeepSeek's profile.

    An interval spans perfect balance and no rebalancing, where experts are rebalanced: how well the statistics fit the
    traffic is not known. On either side stands the error that the fitted row of the same phase had before the fit,
    `LEAST_ERROR` at least: what the model does not know of itself. On another chip than that of the fitted rows, the
    interval spans the believed ranges of its efficiencies too.

    Args:
        trace: routing; made into the model's shape where it has another one.
        report: told each set-up as it is begun.
    """
    model = load_model(MODEL)
    ffn = model.experts
    even = even_trace(len(model.moe_layers), ffn.num_experts, ffn.top_k, ffn.num_groups, ffn.top_groups)
    traces = {"even": even, "routed": routing_like(trace, model)}
    prepared: dict[Setup, Prepared] = {}

    def prepare(setup: Setup) -> Prepared:
        key = replace(setup, name="", reported=None, source="", fitted=False, note="")
        if key not in prepared:
            prepared[key] = Prepared.of(setup, model, traces)
        return replace(prepared[key], setup=setup)

    rows = {setup.phase: prepare(setup) for setup in setups if setup.fitted}
    values = fit(rows["prefill"], rows["decode"])
    before = {phase: row.tokens_per_s(row.price({})) / (row.setup.reported or 1.0) for phase, row in rows.items()}
    cases = []
    for setup in setups:
        report(setup.name)
        mine = prepare(setup)
        found = mine.tokens_per_s(mine.price(values))
        ends = [found]
        if setup.placement == "eplb":
            unbalanced = replace(setup, placement="contiguous")
            others = prepare(unbalanced), prepare(replace(unbalanced, routing="even"))
            ends += [other.tokens_per_s(other.price(values)) for other in others]
        device = mine.scenario.cluster.device
        if device.flops_per_s != rows["decode"].scenario.cluster.device.flops_per_s:
            ends += [mine.tokens_per_s(mine.price(values, bound)) for bound in ("low", "high")]
        apart = np.exp(max(abs(float(np.log(before[setup.phase]))), LEAST_ERROR))
        low, high = float(min(ends) / apart), float(max(ends) * apart)
        cases.append(Case(setup.name, setup.reported, found, low, high, setup.fitted, unit="tokens/s"))
    facts: dict[str, Any] = {
        "throughput": "tokens a second and accelerator, of one full iteration",
        "routing": f"{traces['routed'].name}; even where perfectly balanced",
        "computation over its rooflines, fitted": values[KERNELS[0]],
        "launches for each one counted, fitted": values[LAUNCHES],
        "before the fit": ", ".join(f"{phase} {ratio - 1:+.1%}" for phase, ratio in before.items()),
    }
    predicted = {case.case: case.predicted for case in cases}
    for lever, name, without, reported in LEVERS:
        if {name, f"{name}, {without}"} <= set(predicted):
            ratio = predicted[name] / predicted[f"{name}, {without}"]
            facts[lever] = f"x{ratio:.2f}" + (f" ({reported})" if reported else "")
    return Validation("wide-ep", (*cases, *bus_cases()), facts)


def bus_cases() -> list[Case]:
    """Dispatch and combine on CloudMatrix384's bus, 128 tokens a rank, at what DeepEP reaches inside a node of H800."""
    cases = []
    reached = LowLatency.reached
    assert reached is not None
    for op, row_bytes, reported in BUS:
        for ep, seconds in reported.items():
            cluster = load_cluster(f"{ep} of cloudmatrix-384")
            num_bytes = 128 * 8 * (1 - 1 / ep) * row_bytes
            start_s = float(Operators(cluster.device).collective_start(ep, cluster).seconds)
            found = [start_s + num_bytes / (cluster.scale_up.bytes_per_s * end) for end in astuple(reached[0])[:3]]
            found_us = [1e6 * x for x in found]
            name = f"CloudMatrix384, {op} EP{ep}, 128 tokens"
            cases.append(Case(name, 1e6 * seconds, found_us[0], found_us[2], found_us[1], unit="us"))
    return cases
