"""The rows of a file of requests as one table, whether it is CSV, JSON, JSON lines or Parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"


@dataclass(frozen=True)
class Raw:
    """A table, and what the file around it says.

    kind: who wrote it, where the columns do not tell; hint: what would do for times that lack.
    """

    table: pa.Table
    kind: str = ""
    hint: str = ""
    notes: tuple[str, ...] = ()


def read_raw(path: Path) -> Raw:
    """The rows.

    Raises:
        ValueError: the file is missing, empty, or cannot be parsed.
    """
    data = read_bytes(path)
    start = data[:64].lstrip()
    try:
        if data.startswith(PARQUET):
            return Raw(pq.read_table(pa.BufferReader(data)))
        if start.startswith(b"["):
            return Raw(_from_rows(json.loads(data)))
        if start.startswith(b"{"):
            return _from_json(data)
        return Raw(_from_csv(data))
    except (pa.ArrowException, json.JSONDecodeError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split()).replace("Row #", "line ")
        raise ValueError(f"{path}: not whole CSV, JSON, JSON lines or Parquet ({said}); mend that row") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a file of requests: CSV, JSON, JSON lines or Parquet")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give a whole file") from error
    if not data.strip():
        raise ValueError(
            f"{path}: is empty; give one row for each request, such as arrival_s,prompt_tokens,output_tokens"
        )
    return data


def _from_csv(data: bytes) -> pa.Table:
    """By one thread: errors then name the line."""
    return pyarrow.csv.read_csv(
        pa.BufferReader(data),
        read_options=pyarrow.csv.ReadOptions(use_threads=False),
        convert_options=pyarrow.csv.ConvertOptions(timestamp_parsers=[], strings_can_be_null=True, null_values=[""]),
    )


def _from_rows(rows: list[Any]) -> pa.Table:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(
                f"row {number}: must be an object of column names and values, given {row!r:.50}; mend or leave it out"
            )
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    """An array; of text where the values are of several kinds, so that whoever reads it can name the odd row."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def _from_json(data: bytes) -> Raw:
    """JSON lines, or one object: the result of a run of `vllm bench serve`."""
    for text in (data.lstrip().partition(b"\n")[0], data):
        try:
            whole = json.loads(text)
        except ValueError:
            continue
        if "input_lens" in whole:
            return _from_vllm(whole)
        break
    options = pyarrow.json.ReadOptions(block_size=max(len(data) + 1, 1 << 20))
    try:
        return Raw(pyarrow.json.read_json(pa.BufferReader(data), read_options=options))
    except pa.ArrowException:
        return Raw(_from_lines(data))


def _from_lines(data: bytes) -> pa.Table:
    """JSON lines, more slowly than pyarrow, which does not tell the line of an error."""
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number}: must be a whole JSON object, given {line.decode(errors='replace')!r:.60} "
                f"(column {error.colno}: {error.msg}); mend or leave out the line"
            ) from error
    return _from_rows(rows)


def _from_vllm(result: dict[str, Any]) -> Raw:
    """`vllm bench serve --save-result --save-detailed`: lists by request; failed ones are left out."""
    has_times = isinstance(result.get("start_times"), list)
    names = {"input_lens": "input_tokens", "output_lens": "output_tokens"}
    if has_times:
        names = {"input_lens": "input_toks", "output_lens": "output_toks", "start_times": "arrival_time"}
    lists = (*names, "errors") if result.get("errors") else tuple(names)
    sizes = {name: len(result[name]) if isinstance(result.get(name), list) else 0 for name in lists}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"{', '.join(lists)}: must be lists of one length, given {sizes}; give the file as vLLM wrote it"
        )
    errors = result.get("errors") or [""] * sizes["input_lens"]
    good = [row for row, error in enumerate(errors) if not error]
    table = pa.table({new: _column([result[old][row] for row in good]) for old, new in names.items()})
    failed = len(errors) - len(good)
    notes = (f"{failed} requests failed in the run and are left out",) if failed else ()
    rate, hint = result.get("request_rate"), ""
    if not has_times and rate in (None, "inf"):
        hint = 'arrivals = "at_once", as request_rate = inf has it, or a process with a rate of your own'
    elif not has_times:
        hint = f'arrivals = "poisson" with rate_per_s = {rate}, the request_rate of the run'
    return Raw(table, "vllm bench serve", hint, notes)
