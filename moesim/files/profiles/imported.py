"""What an import found: the tables, and in words what was read and what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moesim.costs.measured import MeasuredTable

Floats = NDArray[np.float64]


@dataclass
class Imported:
    """Tables by the path of their file, without its suffix; lines on what was read, and on what was not and why."""

    tables: dict[str, list[MeasuredTable]] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def merged(points_ND: Floats, seconds_N: Floats) -> tuple[Floats, Floats]:
    """Distinct points and the median of each one's times."""
    order = np.lexsort((seconds_N, *points_ND.T[::-1]))
    points, seconds = points_ND[order], seconds_N[order]
    start = np.flatnonzero(np.r_[True, (points[1:] != points[:-1]).any(axis=1), True])
    low, high = start[:-1] + (np.diff(start) - 1) // 2, start[:-1] + np.diff(start) // 2
    return points[start[:-1]], (seconds[low] + seconds[high]) / 2


def split(columns: Mapping[str, pa.Array]) -> Iterator[tuple[dict[str, str], NDArray[np.int64]]]:
    """Rows with equal words in all columns, in the order of the words: those that are not empty, and which rows."""
    which = np.zeros(len(next(iter(columns.values()))), np.int64)
    for column in columns.values():
        found = column.dictionary_encode("encode")
        words, code = np.unique([word or "" for word in found.dictionary.to_pylist()], return_inverse=True)
        _, which = np.unique(which * len(words) + code[found.indices.to_numpy()], return_inverse=True)
    order = np.argsort(which, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(which[order])) + 1):
        if len(rows):
            said = {name: column[rows[0]].as_py() for name, column in columns.items()}
            yield {name: word for name, word in said.items() if word}, rows
