"""Timed cells as measured tables: of one operator, format and set of facts each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from moesim.costs.measured import MeasuredTable
from moesim.profile.rounds import Samples
from moesim.profile.shapes import AXES, Cell

MEDIAN_SPREAD = 1.2533
"""Standard deviation of a median of n normal values, over that of one divided by the root of n."""


def tables_of(
    cells: Sequence[Cell],
    samples: Samples,
    clock: str,
    device: str = "cpu",
    provenance: Mapping[str, str] | None = None,
) -> list[MeasuredTable]:
    """The cells that were timed and have a shape, on `clock`, `cpu_s` or `wall_s`.

    Low and high are the 20th and 80th percentile of the *median* of the rounds, told from those of the rounds.
    """
    found = samples.percentiles(clock)
    alike: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        if cell.key in found and cell.shape:
            alike.setdefault((cell.op, cell.dtype, cell.model, cell.facts), []).append(cell)
    tables = []
    for mine in alike.values():
        p20, p50, p80 = np.array([found[cell.key] for cell in mine]).T
        share = np.minimum(1.0, MEDIAN_SPREAD / np.sqrt([len(samples.laps[cell.key]) for cell in mine]))
        points = np.array([cell.shape for cell in mine], np.float64)
        tables.append(
            MeasuredTable(
                mine[0].op, mine[0].dtype, device, AXES[mine[0].op], points, p50, p50 * (p20 / p50) ** share,
                p50 * (p80 / p50) ** share, mine[0].table_facts, provenance or {},
            )
        )  # fmt: skip
    return tables


def medians(cells: Sequence[Cell], samples: Samples, clock: str) -> dict[Cell, float]:
    """Median seconds on `clock` of the cells that were timed."""
    found = samples.percentiles(clock, (50,))
    return {cell: float(found[cell.key][0]) for cell in cells if cell.key in found}


def provenance_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Where the times of a profile come from, as its file says it; `facts` are those of the machine."""
    told = {"source", "licence", "driver", "library_versions", "date", "torch", "transformers"}
    return {
        "source": "moesim profile run",
        "licence": "none needed: measured on the user's own machine",
        "driver": str(facts.get("driver", "none: a CPU")),
        "library_versions": f"torch {facts['torch']}, transformers {facts['transformers']}",
        "date": datetime.now(UTC).date().isoformat(),
        **{name: str(said) for name, said in facts.items() if name not in told},
    }
