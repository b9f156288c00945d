"""Count traces as Parquet: one row for each (window, layer, expert), sorted so, with the count.

Name, model, top k and provenance are JSON in the schema metadata under the key `moesim-counts`. The reader believes
nothing: it checks every rule and reports all mistakes of a file at once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moesim.files.tables import raise_all
from moesim.files.trace_rules import header_mistakes
from moesim.routing.counts import ORIGIN, CountTrace

FORMAT = 1
METADATA_KEY = b"moesim-counts"
_COLUMNS = {"window": pa.int32(), "layer": pa.int16(), "expert": pa.int32(), "count": pa.int64()}


def is_count_file(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a Parquet file with the header of a count trace."""
    try:
        return METADATA_KEY in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def write_counts(trace: CountTrace, path: str | os.PathLike[str]) -> None:
    """Write `trace` to `path`; the file appears whole or not at all.

    Raises:
        ValueError: the trace breaks a rule (all mistakes are listed), or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        raise ValueError(f"{path}: counts are written as Parquet; give a name that ends with .parquet")
    header: dict[str, Any] = {
        "format": FORMAT,
        "name": trace.name,
        "model": trace.model,
        "origin": ORIGIN,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "provenance": dict(trace.provenance),
    }
    raise_all(str(path), header_mistakes(header) + trace.mistakes())
    grid = _grid(trace.counts_WLE.size, trace.layers, trace.num_experts)
    arrays = [pa.array(values, _COLUMNS[name]) for name, values in (*grid.items(), ("count", trace.counts_WLE.ravel()))]
    schema = pa.schema(list(_COLUMNS.items()), {METADATA_KEY: json.dumps(header, sort_keys=True).encode()})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(
            pa.Table.from_arrays(arrays, schema=schema), temporary, compression="zstd", write_page_checksum=True
        )
        temporary.replace(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot write the counts: {error}; choose a writable folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def _grid(num_rows: int, layers: tuple[int, ...], num_experts: int) -> dict[str, NDArray[Any]]:
    """The columns that every count trace of a shape has alike, its first `num_rows` rows."""
    row = np.arange(num_rows)
    return {
        "window": row // (len(layers) * num_experts),
        "layer": np.asarray(layers)[row // num_experts % len(layers)],
        "expert": row % num_experts,
    }


def read_counts(path: str | os.PathLike[str]) -> CountTrace:
    """The count trace in the file `path`, checked against every rule.

    Raises:
        ValueError: the file is missing, is no count trace, or breaks rules; all mistakes are listed, one a line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; write one with `moesim trace convert`")
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        table.validate(full=True)
    except (OSError, ValueError, pa.ArrowException) as error:  # damage shows as any of them
        raise ValueError(f"{path}: not a whole Parquet file ({error}); write the counts again") from error
    header, mistakes = _header(table.schema.metadata)
    mistakes += _column_mistakes(table)
    if not mistakes and not table.num_rows:
        mistakes = ["no rows; count some tokens"]
    raise_all(str(path), mistakes)
    columns = {name: table[name].to_numpy() for name in _COLUMNS}
    layers = tuple(np.unique(columns["layer"]).tolist())
    E = header["num_experts"]
    raise_all(str(path), _row_mistakes(columns, layers, E))
    trace = CountTrace(
        header["name"],
        header["model"],
        header.get("top_k"),  # type: ignore[arg-type]  # the rules of the trace check it
        columns["count"].reshape(-1, len(layers), E),
        layers,
        header["provenance"],
    )
    raise_all(str(path), trace.mistakes())
    return trace


def _header(metadata: dict[bytes, bytes] | None) -> tuple[dict[str, Any], list[str]]:
    raw = (metadata or {}).get(METADATA_KEY)
    try:
        header = json.loads(raw or b"null")
    except ValueError:
        header = None
    if not isinstance(header, dict):
        return {}, ["header: the schema metadata has no JSON object under 'moesim-counts'; write the file with moesim"]
    found = header_mistakes(header)
    if header.get("format") != FORMAT:
        found.insert(0, f"header: format must be {FORMAT}; given {header.get('format')!r}; update moesim")
    if header.get("origin") not in (ORIGIN, None) and not found:
        found.append(f"header: the origin of a count trace must be {ORIGIN!r}; given {header['origin']!r}")
    return header, found


def _column_mistakes(table: pa.Table) -> list[str]:
    found = []
    for name, kind in _COLUMNS.items():
        if name not in table.column_names:
            found.append(f"column {name} lacks; the file has {', '.join(table.column_names)}")
        elif table.schema.field(name).type != kind:
            found.append(f"column {name} must be {kind}; given {table.schema.field(name).type}")
        elif table[name].null_count:
            found.append(f"column {name}: must not be null; fill it in ({table[name].null_count} rows)")
    return found


def _row_mistakes(columns: dict[str, NDArray[Any]], layers: tuple[int, ...], num_experts: int) -> list[str]:
    """Every (window, layer, expert) must be there once, in order."""
    rows = len(columns["count"])
    grid = _grid(rows + 1, layers, num_experts)
    wrong = np.any([columns[name] != grid[name][:rows] for name in grid], axis=0)
    if not wrong.any() and rows % (len(layers) * num_experts) == 0:
        return []
    row = int(wrong.argmax()) if wrong.any() else rows
    said = {name: columns[name][row].item() for name in grid} if row < rows else "the end of the file"
    asked = {name: grid[name][row].item() for name in grid}
    return [
        f"row {row}: each window must have every layer and each layer every expert once, sorted by (window, layer, "
        f"expert); wanted {asked}, given {said}; a count of 0 is written out too"
    ]
