"""What a run leaves: records of operations, and a result with its metrics, intervals and provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """One operation on one rank, as it ran.

    step: index of the iteration; after: indices, in the same list of records, of what it waited for.
    """

    name: str
    phase: str
    step: int
    layer: int
    rank: int
    resource: str
    start_s: float
    finish_s: float
    num_bytes: float
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Result:
    """The answer of one run.

    Attributes:
        name: name of the set-up, as in the scenario file.
        scenario: the scenario as plain data, enough to run it again.
        metrics: name -> value, units in the name.
        intervals: name -> (low, high) for the metrics that depend on believed efficiencies.
        provenance: measured_fraction, fitted_fraction, datasheet_fraction, assumed_fraction of the busy time.
        breakdown_s: phase ("prefill", "decode") -> part ("attention", "dispatch", "experts", "combine",
            "imbalance", ...) -> exposed seconds of one iteration, mean over ranks and iterations; they add up to
            the iteration.
        memory_bytes: part -> bytes on the fullest device; the capacity under "capacity".
        load_LR: tokens x experts computed per MoE layer and rank, summed over decode, as nested tuples.
        step_s: seconds of each decode iteration, in order.
        records: timeline of the iterations that were asked for, in order of start.
        warnings: what the reader should know about this run.
    """

    name: str
    scenario: Mapping[str, Any]
    engine: str
    seed: int
    version: str
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    provenance: Mapping[str, float] = field(default_factory=dict)
    breakdown_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    memory_bytes: Mapping[str, float] = field(default_factory=dict)
    load_LR: tuple[tuple[int, ...], ...] = ()
    step_s: tuple[float, ...] = ()
    records: tuple[Record, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The machine-readable shape of `moesim run --json`."""
        return {
            "scenario": dict(self.scenario),
            "engine": self.engine,
            "seed": self.seed,
            "version": self.version,
            "metrics": dict(self.metrics),
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "provenance": dict(self.provenance),
            "breakdown_s": {phase: dict(parts) for phase, parts in self.breakdown_s.items()},
            "memory_bytes": dict(self.memory_bytes),
            "warnings": list(self.warnings),
        }
