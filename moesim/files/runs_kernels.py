"""Measured kernel tables in aiconfigurator's layout, read as arrays.

Layout: DIR/<system>/<family>/<backend>/<version>/<table>.parquet, DIR or its folder `data`; one measurement a row, with
`latency` in milliseconds, or times in microseconds under names that say so.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moesim.files.tables import raise_all

Floats = NDArray[np.float64]
Conditions = tuple[tuple[str, str | int], ...]


def kernel_root(path: str | Path) -> Path:
    """The folder that holds the systems.

    Raises:
        ValueError: there is no such folder, or no table in it.
    """
    path = Path(path)
    root = path / "data" if (path / "data").is_dir() else path
    if not next(root.glob("*/*/*/*/*_perf.parquet"), None):
        raise ValueError(
            f"{path}: no <system>/<family>/<backend>/<version>/*_perf.parquet below it; give kernel tables"
        )
    return root


@cache
def kernel_tables(root: Path, system: str, family: str, backend: str, table: str) -> tuple[Path, ...]:
    """Files of every version that has the table, the newest first."""
    found = root.glob(f"{system}/{family}/{backend}/*/{table}.parquet")
    return tuple(sorted(found, key=lambda path: _version(path.parent.name), reverse=True))


@cache
def _table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error}); copy it again") from error


def _version(text: str) -> list[tuple[int, str]]:
    """Versions in order: numbers as numbers, so that 0.5.14 is newer than 0.5.6."""
    parts = text.replace("rc", ".-1.").replace("post", "").split(".")
    return [(int(part), "") if part.lstrip("-").isdigit() else (-1, part) for part in parts]


@cache
def kernel_rows(
    root: Path, system: str, family: str, backend: str, table: str, conditions: Conditions, columns: tuple[str, ...]
) -> tuple[Floats, ...] | None:
    """Columns of the rows that meet every condition, and last their seconds, where the table has a latency.

    The newest version that has such rows is taken. A condition on a column that a table lacks is not asked.

    Returns:
        One array a column; None where no version has such a row.

    Raises:
        ValueError: a file is damaged, or lacks a column.
    """
    for path in kernel_tables(root, system, family, backend, table):
        read = _table(path)
        has = read.column_names
        raise_all(str(path), [f"column {name} lacks; it has {', '.join(has)}" for name in columns if name not in has])
        for name, value in conditions:
            if name in has:
                read = read.filter(pc.equal(read[name], value))
        if read.num_rows:
            latency = (read["latency"].to_numpy() * 1e-3,) if "latency" in has else ()
            return (*(read[name].to_numpy().astype(np.float64) for name in columns), *latency)
    return None


def kernel_words(root: Path, system: str, family: str, backend: str, table: str, column: str) -> tuple[str, ...]:
    """Different words of a column of the newest version, sorted; none where there is no such table."""
    for path in kernel_tables(root, system, family, backend, table):
        return tuple(sorted(set(_table(path)[column].to_pylist())))
    return ()
