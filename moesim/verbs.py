"""The verbs of moesim: load a scenario file, run a scenario."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from moesim.estimate import estimate
from moesim.files.scenarios import load_scenarios
from moesim.files.services import is_service, load_services
from moesim.results import Result
from moesim.scenario import Scenario
from moesim.service import Service
from moesim.serving.metrics import ALL, Window
from moesim.serving.results import ServingResult
from moesim.serving.runs import run_service as run_at_bounds
from moesim.simulate import simulate
from moesim.simulate.serving import simulate_service

__all__ = ["is_service", "load", "load_services", "run", "run_service", "simulate_service"]

DECODING = ("tpot_s", "output_tokens_per_s", "output_tokens_per_s_per_device")
"""Metrics that a calibration was fitted on."""

ENGINES: dict[str, Callable[..., Result]] = {"estimate": estimate, "simulate": simulate}


def load(path: str | Path, changes: Sequence[str] = ()) -> list[Scenario]:
    """Read a scenario file: the base set-up first, then those beside it. See `load_scenarios`."""
    return load_scenarios(path, changes)


def run(scenario: Scenario, engine: str | None = None, timeline: int = 0) -> Result:
    """Run a scenario at the value, and at both ends of its believed efficiencies.

    With a calibration, what its residuals say of decoding is the interval of the metrics of decoding, and the least
    width of the others.

    Args:
        engine: "simulate" or "estimate"; None takes the scenario's own.
        timeline: iterations of each phase that leave their records.

    Returns:
        The result at the value; an interval for each metric that the efficiencies move.
    """
    engine = engine or scenario.engine
    middle = ENGINES[engine](scenario, "value", timeline)
    low, high = (ENGINES[engine](scenario, bound).metrics for bound in ("low", "high"))
    intervals = {}
    for name, value in middle.metrics.items():
        if low[name] == high[name] == value:
            continue
        ends = min(low[name], high[name], value), max(low[name], high[name], value)
        known, is_rate = scenario.calibration, "_per_s" in name
        if known is not None and (is_rate or name.endswith("_s")):
            ratios = (1 / known.high_ratio, 1 / known.low_ratio) if is_rate else (known.low_ratio, known.high_ratio)
            own = value * ratios[0], value * ratios[1]
            ends = own if name in DECODING else (min(ends[0], own[0]), max(ends[1], own[1]))
        intervals[name] = ends
    return dataclasses.replace(middle, intervals=intervals)


def run_service(service: Service, window: Window = ALL) -> ServingResult:
    """Run a service at the value, and at both ends of its believed efficiencies. See `moesim.serving.runs`."""
    return run_at_bounds(service, simulate_service, window)
