"""Timed cells as a table of points: Parquet, one row for each operator, shape and clock."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moesim.profile.rounds import Samples
from moesim.profile.shapes import AXES, Cell

METADATA_KEY = b"moesim-points"
SCHEMA = pa.schema(
    [
        ("op", pa.string()),
        ("model", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("clock", pa.string()),
        ("p20_s", pa.float64()),
        ("p50_s", pa.float64()),
        ("p80_s", pa.float64()),
        ("rounds", pa.int32()),
    ]
)


def points_of(cells: Sequence[Cell], samples: Samples, dtype: str) -> pa.Table:
    """The cells that were timed: 20th, 50th and 80th percentile over rounds, of CPU and of wall seconds."""
    found = {clock: samples.percentiles(f"{clock}_s") for clock in ("cpu", "wall")}
    rows = [
        {
            "op": cell.op,
            "model": cell.model,
            "dtype": dtype,
            "shape": list(cell.shape),
            "clock": clock,
            **dict(zip(("p20_s", "p50_s", "p80_s"), map(float, found[clock][cell.key]), strict=True)),
            "rounds": len(samples.laps[cell.key]),
        }
        for cell in cells
        if cell.key in samples.laps
        for clock in ("cpu", "wall")
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write_points(table: pa.Table, path: Path, facts: Mapping[str, Any]) -> None:
    """Write the points with the axes of each operator and `facts` of the machine; the file appears whole or not at all.

    Raises:
        ValueError: the file cannot be written.
    """
    header = {"axes": AXES, "facts": dict(facts)}
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(header, sort_keys=True).encode()})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot write the points: {error}; choose a writable folder") from error
    finally:
        temporary.unlink(missing_ok=True)
