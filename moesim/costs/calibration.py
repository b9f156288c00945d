"""What kernels do not show: the constants, what each means and where it may lie, and a calibration that fitted them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Constant:
    """One constant of the serving model.

    Attributes:
        value: before any fit, and what a fit without evidence stays at.
        spread: standard deviation of its logarithm (its log-odds for rates) that is believed beforehand.
        low, high: physical range; a fit never leaves it.
        is_rate: whether it lies between 0 and 1.
    """

    name: str
    value: float
    spread: float
    low: float
    high: float
    unit: str
    meaning: str
    is_rate: bool = False

    def coordinate(self, value: float) -> float:
        """The value on the scale that fits move along: its logarithm, or log-odds."""
        return float(np.log(value / (1 - value)) if self.is_rate else np.log(value))

    def at(self, coordinate: float) -> float:
        """The value at a coordinate."""
        return float(1 / (1 + np.exp(-coordinate)) if self.is_rate else np.exp(coordinate))


CONSTANTS = (
    Constant("gemm_factor", 1.0, 0.25, 0.5, 2.5, "", "matrix products outside the experts, over their kernel's time"),
    Constant("attention_factor", 1.0, 0.25, 0.5, 2.5, "", "attention over its kernel's time"),
    Constant("experts_factor", 1.0, 0.2, 0.5, 2.5, "", "routed experts over their kernel's time: skew and padding"),
    Constant("collective_factor", 1.0, 0.4, 0.2, 4.0, "", "bytes of collectives; overlap makes it less than 1"),
    Constant("collective_start_factor", 1.0, 0.5, 0.1, 5.0, "", "starting a collective inside a node"),
    Constant("internode_start_factor", 8.0, 0.7, 1.0, 40.0, "", "starting a collective between nodes"),
    Constant("launch_factor", 0.6, 0.6, 0.1, 3.0, "", "starting a kernel, over the device's time; graphs save some"),
    Constant("iteration_overhead_s", 3e-4, 1.0, 1e-5, 5e-3, "s", "host work of an iteration that no kernel hides"),
    Constant("prefill_factor", 1.0, 0.3, 0.3, 2.0, "", "prefill time that decoding requests wait, over its parts"),
    Constant("acceptance_rate", 0.7, 0.7, 0.3, 0.95, "", "chance that a draft is accepted, to 1,024 outputs", True),
    Constant("acceptance_gain", 0.3, 1.0, 0.02, 1.5, "", "what its log-odds gain with 8 times the output: it repeats"),
)  # fmt: skip

NAMES = tuple(constant.name for constant in CONSTANTS)


LEVEL = 0.9
"""Share of held-out measurements that an interval is made to hold."""


@dataclass(frozen=True)
class Calibration:
    """Fitted constants and the residuals of predictions made without the runs they were made for.

    Attributes:
        values: name of a constant -> its value.
        sources: name -> "fitted: ..." or "assumed: ..." where no run speaks of it.
        low_ratio, high_ratio: ends of the 90 % interval of measured over predicted.
        kernels: what priced the kernels, "roofline" or "measured tables: ..."; predictions must use the same.
        facts: how many runs, which groups, errors.
    """

    values: Mapping[str, float]
    sources: Mapping[str, str]
    low_ratio: float
    high_ratio: float
    kernels: str
    facts: Mapping[str, Any]

    @property
    def needs_tables(self) -> bool:
        """Whether kernels were priced from measured tables."""
        return self.kernels.startswith("measured")

    def as_json(self) -> dict[str, Any]:
        """The machine-readable shape of `moesim calibrate --json`, without the runs."""
        constants = {
            c.name: {
                "value": self.values[c.name], "low": c.low, "high": c.high, "unit": c.unit,
                "source": self.sources[c.name], "meaning": c.meaning,
            }
            for c in CONSTANTS
        }  # fmt: skip
        residuals = {"level": LEVEL, "low_ratio": self.low_ratio, "high_ratio": self.high_ratio}
        return {"kernels": self.kernels, "constants": constants, "residuals": residuals, "facts": dict(self.facts)}


def starting_values() -> Floats:
    """Values before any fit, in the order of `CONSTANTS`."""
    return np.array([constant.value for constant in CONSTANTS])


def with_measured_gap(constants: Sequence[Constant], gap_s: float) -> tuple[Constant, ...]:
    """The constants with the host overhead started, and held closely, at a gap measured in a profiler's trace.

    Raises:
        ValueError: the gap lies outside the constant's range.
    """
    found = []
    for constant in constants:
        if constant.name == "iteration_overhead_s":
            if not constant.low <= gap_s <= constant.high:
                raise ValueError(
                    f"trace: gaps of {gap_s:.3g} s an iteration lie outside {constant.low:g} to {constant.high:g} s, "
                    "which is no serving loop; give a trace of decode iterations"
                )
            constant = replace(constant, value=gap_s, spread=0.2)
        found.append(constant)
    return tuple(found)
