"""Whole passes of a real MoE model on the machine at hand, predicted from timings of its parts.

The parts and the passes are timed in the same shuffled rounds (`moesim.profile`). A pass is then predicted from the
table of parts alone: nothing is fitted to passes. What is taken from the pass itself is how many tokens each expert
got, which is moesim's input (a routing trace).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.profile.machine import Peaks, keep_freed_memory, machine_facts, one_thread, peaks, rates
from moesim.profile.passes import Pass
from moesim.profile.rounds import Samples, Timing, time_rounds
from moesim.profile.shapes import SHAPES, Cell, ModelShape, attention_work, work
from moesim.profile.sums import Part, Tables, parts_of
from moesim.profile.tables import tables_of
from moesim.validate.cases import Case, Validation, summary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moesim.costs.measured import MeasuredTable
    from moesim.profile.cpu import Limits, Whole

WIDTH = 1.645
"""Standard deviations to each side of a 90 % interval."""
MIN_ROUNDS = 6
"""Rounds that must fit, or models and steps are left out."""


def validate_this_machine(
    budget_s: float = 270.0,
    seed: int = 0,
    shapes: Sequence[ModelShape] = tuple(SHAPES.values()),
    limits: Limits | None = None,
    num_prefill: int = 8,
    num_decode: int = 12,
    report: Callable[[float], None] = lambda share: None,
) -> Validation:
    """Time parts and passes of `shapes` on one thread of this CPU, and predict the passes from the parts.

    Args:
        budget_s: seconds on the wall for all of it, start of torch included.
        seed: of weights, sizes, routing and the order of timings.
        shapes: models to run; the later ones are left out where time is short.
        limits: largest sizes; those of `Limits` if None.
        num_prefill, num_decode: passes of each model.
        report: told the share of the time that is used.

    Raises:
        ValueError: the budget is too small to predict anything.
    """
    begun = time.perf_counter()
    one_thread()
    keep_freed_memory()
    from moesim.profile.cpu import Limits, jobs_with_passes

    cells, jobs, wholes = jobs_with_passes(shapes, limits or Limits(), num_prefill, num_decode, seed)
    one_thread()
    samples = Samples()
    left_s = budget_s - (time.perf_counter() - begun)
    timing = time_rounds(jobs, samples, left_s, seed=seed, min_rounds=MIN_ROUNDS, report=report)
    cases = {clock: predict(cells, wholes, samples, clock) for clock in ("cpu_s", "wall_s")}
    if not cases["cpu_s"]:
        raise ValueError(f"{budget_s:.0f} s are too few to time a model on this machine; give a larger --budget")
    facts = _facts(cells, wholes, samples, timing, cases, time.perf_counter() - begun)
    return Validation("this-machine", tuple(cases["cpu_s"]), facts)


def predict(cells: Sequence[Cell], wholes: Sequence[Whole], samples: Samples, clock: str) -> list[Case]:
    """A case for each pass that was timed and that the tables reach; closure passes only set the intervals' width."""
    median = {key: float(found[0]) for key, found in samples.percentiles(clock, (50,)).items()}
    top = peaks(rates({cell: median[cell.key] for cell in cells if not cell.model and cell.key in median}))
    tables: dict[str, dict[str, MeasuredTable]] = {whole.shape.name: {} for whole in wholes}
    for table in tables_of([cell for cell in cells if cell.model], samples, clock):
        tables[table.facts["model"]][table.op] = table
    found = [(whole, _reached(tables[whole.shape.name], whole)) for whole in wholes if whole.key in median]
    closure = [
        np.log(sum(part.seconds for part in parts.values()) / median[whole.key])
        for whole, parts in found
        if whole.is_closure and parts
    ]
    return [
        _case(whole, parts, median[whole.key], closure, top) for whole, parts in found if parts and not whole.is_closure
    ]


def _reached(tables: Tables, whole: Whole) -> dict[str, Part]:
    """Seconds of the parts, or none where cells that were dropped leave the pass outside of the tables."""
    try:
        return parts_of(tables, whole.run, whole.counts_LE)
    except ValueError:
        return {}


def half_width(parts: Mapping[str, Part], closure: Sequence[float]) -> float:
    """Half of the 90 % interval of ln(predicted / measured), from the profile alone.

    Two sources that do not know of each other: the tables' own intervals (spread and interpolation), by each
    operator's share of the pass; and the profile's own passes on its own points, whose errors hold the machine's
    unrest and what parts miss of a whole.
    """
    total_s = sum(part.seconds for part in parts.values())
    own = [part.seconds / total_s * np.log(part.high / part.low) / 2 for part in parts.values()]
    unrest = WIDTH * np.sqrt(np.mean(np.square(closure))) if len(closure) else 0.0
    return float(np.sqrt(np.sum(np.square(own)) + unrest**2))


def _case(whole: Whole, parts: Mapping[str, Part], measured_s: float, closure: Sequence[float], top: Peaks) -> Case:
    predicted_s = sum(part.seconds for part in parts.values())
    factor = float(np.exp(half_width(parts, closure)))
    return Case(
        whole.key,
        measured_s,
        predicted_s,
        predicted_s / factor,
        predicted_s * factor,
        group=f"{whole.run.phase}, {whole.run.routing}",
        baseline=roofline_s(whole.shape, whole.run, whole.counts_LE, top),
    )


def roofline_s(shape: ModelShape, run: Pass, counts_LE: NDArray[np.int64], top: Peaks) -> float:
    """Seconds by a plain roofline: each expert, each attention module and the head at the peaks of the machine.

    Source: Williams, Waterman, Patterson, Roofline, CACM 2009.
    """

    def at_peak(flops: float, num_bytes: float) -> float:
        return max(flops / top.flops_per_s, num_bytes / top.bytes_per_s)

    experts = sum(at_peak(*work(shape, "moe_block", (1, int(rows)))) for rows in counts_LE[counts_LE > 0])
    attention = at_peak(*attention_work(shape, run.batch, run.tokens, run.context))
    size = (run.batch,) if run.phase == "decode" else (run.batch, run.tokens)
    return experts + shape.layers * attention + at_peak(*work(shape, f"frame_{run.phase}", size))


def _facts(
    cells: Sequence[Cell],
    wholes: Sequence[Whole],
    samples: Samples,
    timing: Timing,
    cases: Mapping[str, Sequence[Case]],
    seconds: float,
) -> dict[str, Any]:
    """What the machine is, how restless it was, and errors on the wall and by model."""
    known = {case.case for case in cases["cpu_s"]}
    median = {key: float(found[0]) for key, found in samples.percentiles("cpu_s", (50,)).items()}
    top = peaks(rates({cell: median[cell.key] for cell in cells if not cell.model and cell.key in median}))
    facts: dict[str, Any] = machine_facts() | {
        "seconds": seconds,
        "rounds": timing.rounds,
        "num_cells": sum(cell.key in median for cell in cells),
        "num_dropped": len(timing.dropped),
        "num_unpredicted": sum(not whole.is_closure and whole.key not in known for whole in wholes),
        "peak_flops_per_s": top.flops_per_s,
        "peak_bytes_per_s": top.bytes_per_s,
    }
    for clock, name in (("cpu_s", "cpu"), ("wall_s", "wall")):
        spreads = [
            np.std([getattr(lap, clock) for lap in samples.laps[whole.key]], ddof=1)
            / np.mean([getattr(lap, clock) for lap in samples.laps[whole.key]])
            for whole in wholes
            if len(samples.laps.get(whole.key, ())) > 1
        ]
        facts[f"run_to_run_spread_{name}"] = float(np.median(spreads)) if spreads else float("nan")
    found = summary(cases["wall_s"])
    facts |= {f"wall_{key}": found[key] for key in ("median_abs_error", "p90_abs_error", "bias", "coverage_90")}
    for model in dict.fromkeys(whole.shape.name for whole in wholes):
        mine = summary([case for case in cases["cpu_s"] if case.case.startswith(f"{model}:")])
        facts |= {f"{model}_{key}": mine[key] for key in ("rows", "median_abs_error", "p90_abs_error") if key in mine}
    return facts
