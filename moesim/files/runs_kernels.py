"""Measured kernel tables in aiconfigurator's layout, read as arrays.

Layout: DIR/<system>/<family>/<backend>/<version>/<table>.parquet, DIR or its folder `data`; one measurement a row, with
`latency` in milliseconds.
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
def kernel_table(root: Path, system: str, family: str, backend: str, table: str) -> pa.Table | None:
    """The table of the newest version that has it, or None.

    Raises:
        ValueError: the file is damaged or has no latency.
    """
    found = sorted(root.glob(f"{system}/{family}/{backend}/*/{table}.parquet"), key=lambda p: _version(p.parent.name))
    if not found:
        return None
    try:
        read = pq.read_table(found[-1])
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{found[-1]}: not a whole Parquet file ({error}); copy it again") from error
    raise_all(str(found[-1]), [] if "latency" in read.column_names else ["column latency lacks; it holds milliseconds"])
    return read


def _version(text: str) -> list[tuple[int, str]]:
    """Versions in order: numbers as numbers, so that 0.5.14 is newer than 0.5.6."""
    parts = text.replace("rc", ".-1.").replace("post", "").split(".")
    return [(int(part), "") if part.lstrip("-").isdigit() else (-1, part) for part in parts]


@cache
def kernel_rows(
    root: Path, system: str, family: str, backend: str, table: str, conditions: Conditions, columns: tuple[str, ...]
) -> tuple[Floats, ...] | None:
    """Columns and, last, seconds of the rows that meet every condition; None where there are none.

    A condition on a column that the table lacks is not asked.
    """
    read = kernel_table(root, system, family, backend, table)
    if read is None:
        return None
    for name, value in conditions:
        if name in read.column_names:
            read = read.filter(pc.equal(read[name], value))
    if not read.num_rows:
        return None
    return (*(read[name].to_numpy().astype(np.float64) for name in columns), read["latency"].to_numpy() * 1e-3)
