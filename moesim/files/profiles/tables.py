"""Measured tables as Parquet: one row for each point, with op, dtype, facts, axes, and p20, p50 and p80 in seconds.

A file is of one device and one source. Which columns are axes and which are facts, the device and the provenance are
JSON in the schema metadata under the key `moesim-profile`. An axis (or fact) that a table lacks is null in its rows.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moesim.costs.measured import MeasuredTable, MeasuredTables
from moesim.files.profiles.imported import split
from moesim.files.tables import raise_all

FORMAT = 1
METADATA_KEY = b"moesim-profile"
PROVENANCE = ("source", "licence", "driver", "library_versions", "date")
"""What a file must say about where its times come from."""
TIMES = ("p20_s", "p50_s", "p80_s")


def write_tables(tables: Sequence[MeasuredTable], path: str | os.PathLike[str]) -> None:
    """Write tables of one device and one provenance to `path`; the file appears whole or not at all.

    Raises:
        ValueError: there are no tables, they differ in device or provenance, two are of the same operator, format,
            axes and facts, a name is used for two things, or the file cannot be written.
    """
    path = Path(path)
    mistakes = [] if path.suffix == ".parquet" else ["a profile is Parquet; give a name that ends with .parquet"]
    if len({(table.device, json.dumps(dict(table.provenance), sort_keys=True)) for table in tables}) != 1:
        mistakes.append("tables of one device and one provenance make a file; write the others to files of their own")
    kinds = Counter((table.op, table.dtype, frozenset(table.axes), frozenset(table.facts.items())) for table in tables)
    mistakes += [
        f"{number} tables of {op} in {dtype} have the same axes and facts; merge them, or tell them apart by a fact"
        for (op, dtype, _, _), number in kinds.items()
        if number > 1
    ]
    raise_all(str(path), mistakes)
    axes = list(dict.fromkeys(name for table in tables for name in table.axes))
    facts = sorted({name for table in tables for name in table.facts})
    header = {
        "format": FORMAT,
        "device": tables[0].device,
        "axes": axes,
        "facts": facts,
        "provenance": dict(tables[0].provenance),
    }
    raise_all(str(path), _header_mistakes(header))
    word, number = pa.dictionary(pa.int32(), pa.string()), pa.float64()
    fields = [(name, word) for name in ("op", "dtype", *facts)] + [(name, number) for name in (*axes, *TIMES)]
    schema = pa.schema(fields, {METADATA_KEY: json.dumps(header, sort_keys=True).encode()})
    rows = pa.concat_tables([_rows(table, axes, facts) for table in tables]).select(schema.names).cast(schema)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(rows, temporary, compression="zstd", write_page_checksum=True)
        temporary.replace(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot write the profile: {error}; choose a writable folder") from error
    finally:
        with suppress(OSError):  # where its folder is none, so that it cannot be there
            temporary.unlink()


def _rows(table: MeasuredTable, axes: list[str], facts: list[str]) -> pa.Table:
    N = len(table.seconds_N)
    words = {"op": table.op, "dtype": table.dtype, **{name: table.facts.get(name) for name in facts}}
    columns: dict[str, Any] = {name: pa.array([said] * N, pa.string()) for name, said in words.items()}
    points = table.coordinates()
    for name in axes:
        columns[name] = pa.array(points[name]) if name in points else pa.nulls(N, pa.float64())
    for name, seconds in zip(TIMES, (table.low_N, table.seconds_N, table.high_N), strict=True):
        columns[name] = pa.array(seconds) if seconds is not None else pa.nulls(N, pa.float64())
    return pa.table(columns)


def read_tables(path: str | os.PathLike[str], device: str | None = None) -> list[MeasuredTable]:
    """The tables in the file `path`, checked against every rule; none where it is of another device than the one asked.

    Raises:
        ValueError: the file is missing, is no profile, or breaks rules; all mistakes are listed, one a line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; write one with `moesim profile import`")
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        header = _header(file.schema_arrow)
        if device and isinstance(header, dict) and header.get("device") != device:
            return []
        rows = file.read()
        rows.validate(full=True)
    except (OSError, ValueError, pa.ArrowException) as error:  # damage shows as any of them
        raise ValueError(f"{path}: not a whole Parquet file ({error}); write the profile again") from error
    mistakes = _header_mistakes(header)
    if not mistakes:
        mistakes = _column_mistakes(rows, header)
    raise_all(str(path), mistakes)
    return _tables(rows, header, path)


def _header(schema: pa.Schema) -> Any:
    try:
        return json.loads((schema.metadata or {}).get(METADATA_KEY, b"null"))
    except ValueError:
        return None


def load_profile(path: str | os.PathLike[str], device: str | None = None) -> MeasuredTables:
    """All tables of a profile, or those of one device of it: one file, or the .parquet files anywhere in a folder.

    Raises:
        ValueError: there is no such file or folder, none in it, they are of several devices and none was asked for, or
            one has mistakes.
    """
    path = Path(path)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: no .parquet file in it; make a profile with `moesim profile`")
    tables = [table for file in files for table in read_tables(file, device)]
    if len(devices := sorted({table.device for table in tables})) > 1:
        raise ValueError(
            f"{path}: holds tables of {', '.join(devices)}; a profile is of one device: give the folder of one"
        )
    return MeasuredTables(tables)


def _header_mistakes(header: Any) -> list[str]:
    if not isinstance(header, dict):
        return ["header: the schema metadata has no JSON object under 'moesim-profile'; write the file with moesim"]
    found = []
    if header.get("format") != FORMAT:
        found.append(f"header: format must be {FORMAT}; given {header.get('format')!r}; update moesim")
    if not isinstance(header.get("device"), str) or not header["device"]:
        found.append(f"header: device must be the name of a device; given {header.get('device')!r}")
    for name, least in (("axes", 1), ("facts", 0)):
        names = header.get(name)
        if not isinstance(names, list) or len(names) < least or not all(isinstance(word, str) for word in names):
            found.append(f"header: {name} must be a list of at least {least} names of columns; given {names!r}")
    if not found:
        used = Counter(["op", "dtype", *TIMES, *header["axes"], *header["facts"]])
        found += [
            f"header: {name} is the name of two columns; rename the axis or fact" for name in used if used[name] > 1
        ]
    said = header.get("provenance")
    if not isinstance(said, dict) or not all(isinstance(text, str) for text in said.values()):
        found.append(f"header: provenance must be an object of strings; given {said!r}")
    else:
        found += [
            f"header: provenance must say {name}; 'not said' will do" for name in PROVENANCE if not said.get(name)
        ]
    return found


def _column_mistakes(rows: pa.Table, header: dict[str, Any]) -> list[str]:
    found = [] if rows.num_rows else ["no rows; a profile has at least one point"]
    word, number = pa.dictionary(pa.int32(), pa.string()), pa.float64()
    kinds = {
        **dict.fromkeys(("op", "dtype", *header["facts"]), word),
        **dict.fromkeys((*header["axes"], *TIMES), number),
    }
    for name, kind in kinds.items():
        if rows.column_names.count(name) != 1:
            found.append(f"column {name} must be there once; the file has {', '.join(rows.column_names)}")
        elif rows.schema.field(name).type != kind:
            found.append(f"column {name} must be {kind}; given {rows.schema.field(name).type}")
        elif name in ("op", "dtype", "p50_s") and rows[name].null_count:
            found.append(f"column {name}: must not be null; fill it in ({rows[name].null_count} rows)")
        elif kind == number:
            values = _numbers(rows, name)
            wrong = ~(np.isfinite(values) & (values > 0)) & ~rows[name].is_null().to_numpy()
            if wrong.any():
                row = int(wrong.argmax())
                found.append(f"column {name}: must be positive and finite; given {values[row]} in row {row}")
    return found


def _tables(rows: pa.Table, header: dict[str, Any], path: Path) -> list[MeasuredTable]:
    """One table for each combination of op, dtype, facts, and of which axes there are."""
    numbers = {name: _numbers(rows, name) for name in (*header["axes"], *TIMES)}
    words = {name: rows[name].cast(pa.string()).combine_chunks() for name in ("op", "dtype", *header["facts"])}
    known = np.array([~np.isnan(numbers[name]) for name in header["axes"]])
    shape = pa.array((2 ** np.arange(len(known)) @ known).astype(str))
    tables, mistakes = [], []
    for said, which in split({**words, " shape": shape}):
        axes = tuple(name for name in header["axes"] if not np.isnan(numbers[name][which[0]]))
        op, dtype, _ = (said.pop(name, "") for name in ("op", "dtype", " shape"))
        low, middle, high = (numbers[name][which] for name in TIMES)
        points = np.stack([numbers[name][which] for name in axes], axis=1) if axes else np.empty((len(which), 0))
        spread = not (np.isnan(low).all() and np.isnan(high).all())
        try:
            tables.append(
                MeasuredTable(
                    op, dtype, header["device"], axes, points, middle, low if spread else None,
                    high if spread else None, said, header["provenance"],
                )
            )  # fmt: skip
        except ValueError as error:
            mistakes.append(f"{error} (rows of the file: {_some(which)})")
    raise_all(str(path), mistakes)
    return tables


def _some(which: NDArray[np.int64]) -> str:
    return f"{which[0]} to {which[-1]}, {len(which)} of them"


def _numbers(rows: pa.Table, name: str) -> NDArray[np.float64]:
    return np.asarray(rows[name].to_numpy(), np.float64)
