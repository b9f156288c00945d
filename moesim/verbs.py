"""The verbs of moesim: load a scenario file, run a scenario."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from moesim.estimate import estimate
from moesim.files.scenarios import load_scenarios
from moesim.results import Result
from moesim.scenario import Scenario
from moesim.simulate import simulate

ENGINES: dict[str, Callable[..., Result]] = {"estimate": estimate, "simulate": simulate}


def load(path: str | Path, changes: Sequence[str] = ()) -> list[Scenario]:
    """Read a scenario file: the base set-up first, then those beside it. See `load_scenarios`."""
    return load_scenarios(path, changes)


def run(scenario: Scenario, engine: str | None = None, timeline: int = 0) -> Result:
    """Run a scenario three times, at the value and at both ends of its believed efficiencies.

    Args:
        engine: "simulate" or "estimate"; None takes the scenario's own.
        timeline: iterations of each phase that leave their records.

    Returns:
        The result at the value; an interval for each metric that the efficiencies move.
    """
    engine = engine or scenario.engine
    middle = ENGINES[engine](scenario, "value", timeline)
    low, high = (ENGINES[engine](scenario, bound).metrics for bound in ("low", "high"))
    intervals = {
        name: (min(low[name], high[name], value), max(low[name], high[name], value))
        for name, value in middle.metrics.items()
        if not low[name] == high[name] == value
    }
    return dataclasses.replace(middle, intervals=intervals)
