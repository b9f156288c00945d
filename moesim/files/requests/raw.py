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
        options = pyarrow.csv.ConvertOptions(timestamp_parsers=[], strings_can_be_null=True)
        return Raw(pyarrow.csv.read_csv(pa.BufferReader(data), convert_options=options))
    except (pa.ArrowException, ValueError) as error:  # a JSON error is a ValueError
        raise ValueError(
            f"{path}: not whole CSV, JSON, JSON lines or Parquet ({' '.join(str(error).split())}); mend that row"
        ) from error


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
        raise ValueError(f"{path}: is empty; give one row for each request, such as arrival_s,prompt_tokens,output_tokens")
    return data


def _from_rows(rows: Any) -> pa.Table:
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("a JSON array must hold one object for each request")
    return pa.Table.from_pylist(rows)


def _from_json(data: bytes) -> Raw:
    """JSON lines, or one object: the result of a run of `vllm bench serve`."""
    first = data.lstrip().partition(b"\n")[0]
    try:
        whole = json.loads(first)
    except ValueError:
        whole = json.loads(data)
    if "input_lens" in whole:
        return _from_vllm(whole)
    options = pyarrow.json.ReadOptions(block_size=max(len(data) + 1, 1 << 20))
    return Raw(pyarrow.json.read_json(pa.BufferReader(data), read_options=options))


def _from_vllm(result: dict[str, Any]) -> Raw:
    """`vllm bench serve --save-result --save-detailed`: lists by request; failed ones are left out."""
    has_times = isinstance(result.get("start_times"), list)
    names = {"input_lens": "input_tokens", "output_lens": "output_tokens"}
    if has_times:
        names = {"input_lens": "input_toks", "output_lens": "output_toks", "start_times": "arrival_time"}
    sizes = {name: len(result[name]) if isinstance(result.get(name), list) else 0 for name in names}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{', '.join(names)} must be lists of one length, given {sizes}")
    errors = result.get("errors") or [""] * sizes["input_lens"]
    good = [row for row, error in enumerate(errors) if not error]
    table = pa.table({new: pa.array([result[old][row] for row in good]) for old, new in names.items()})
    failed = len(errors) - len(good)
    notes = (f"{failed} requests failed in the run and are left out",) if failed else ()
    rate, hint = result.get("request_rate"), ""
    if not has_times and rate in (None, "inf"):
        hint = 'arrivals = "at_once", as request_rate = inf has it, or a process with a rate of your own'
    elif not has_times:
        hint = f'arrivals = "poisson" with rate_per_s = {rate}, the request_rate of the run'
    return Raw(table, "vllm bench serve", hint, notes)
