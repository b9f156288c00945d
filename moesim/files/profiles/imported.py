"""What an import found: the tables, and in words what was read and what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.costs.measured import MeasuredTable

Floats = NDArray[np.float64]


@dataclass
class Imported:
    """Tables by the name of the file that they go into; lines on what was read, and on what was not and why."""

    tables: dict[str, list[MeasuredTable]] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def merged(points_ND: Floats, seconds_N: Floats) -> tuple[Floats, Floats]:
    """Distinct points and the median of each one's times."""
    points, which = np.unique(points_ND, axis=0, return_inverse=True)
    order = np.lexsort((seconds_N, which.ravel()))
    start = np.searchsorted(which.ravel()[order], np.arange(len(points) + 1))
    low, high = start[:-1] + (np.diff(start) - 1) // 2, start[:-1] + np.diff(start) // 2
    return points, (seconds_N[order][low] + seconds_N[order][high]) / 2


def split(names: Mapping[str, NDArray[np.str_]]) -> Iterator[tuple[dict[str, str], NDArray[np.int64]]]:
    """Rows with equal words in all columns: those words, and which rows."""
    which = np.zeros(len(next(iter(names.values()))), np.int64)
    for column in names.values():
        _, code = np.unique(column, return_inverse=True)
        _, which = np.unique(which * (code.max(initial=0) + 1) + code, return_inverse=True)
    order = np.argsort(which, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(which[order])) + 1):
        if len(rows):
            yield {name: str(column[rows[0]]) for name, column in names.items()}, rows
