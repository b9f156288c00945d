"""Write requests in moesim's own format: CSV, JSON lines or Parquet, by the ending of the name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from moesim.requests import Requests


def write_requests(requests: Requests, path: str | os.PathLike[str]) -> None:
    """Write to `path`; the file appears whole or not at all.

    Columns: arrival_s, prompt_tokens, output_tokens; priority, topic where any request has one; prefix_blocks and
    block_tokens where prefixes are known. How many clients wait for answers (a closed loop) is a key of [requests].

    Raises:
        ValueError: the name ends otherwise, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".jsonl", ".parquet"):
        raise ValueError(f"{path}: requests are written as .csv, .jsonl or .parquet; give a name that ends so")
    table = _table(requests, is_text=path.suffix == ".csv")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".parquet":
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        elif path.suffix == ".csv":
            pyarrow.csv.write_csv(table, temporary)
        else:
            temporary.write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()), encoding="utf-8")
        temporary.replace(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot write the requests: {error}; choose a writable folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def _table(requests: Requests, is_text: bool) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "arrival_s": pa.array(requests.arrival_s_Q),
        "prompt_tokens": pa.array(requests.prompt_Q),
        "output_tokens": pa.array(requests.output_Q),
    }
    if requests.priority_Q.any():
        columns["priority"] = pa.array(requests.priority_Q)
    if (requests.topic_Q >= 0).any():
        columns["topic"] = pa.array(requests.topic_Q)
    if len(requests.block_ids):
        blocks = pa.ListArray.from_arrays(requests.block_start_Q.astype(np.int32), pa.array(requests.block_ids))
        if is_text:
            blocks = pa.array([" ".join(map(str, row)) for row in blocks.to_pylist()])
        columns["prefix_blocks"] = blocks
        columns["block_tokens"] = pa.array(np.full(len(requests), requests.block_tokens))
    return pa.table(columns)
