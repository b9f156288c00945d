"""Every request of a serving run as a row of a table: CSV for people, Parquet for programs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from moesim.report import check_target, replace_file
from moesim.service import Slo
from moesim.serving.metrics import keeps_slo, latencies
from moesim.serving.results import ServingResult

COLUMNS = {
    "setup": "name of the set-up",
    "request": "number of the request, by arrival",
    "arrival_s": "seconds from the start of the run",
    "scheduled_s": "first taken into an iteration; empty where it did not come to that, as below",
    "first_token_s": "first token out",
    "finish_s": "last token out",
    "queueing_s": "arrival to first iteration",
    "ttft_s": "arrival to first token",
    "tpot_s": "seconds per output token after the first; empty for answers of one token",
    "e2e_s": "arrival to last token",
    "worst_itl_s": "longest gap between two tokens",
    "prompt_tokens": "tokens of the prompt",
    "output_tokens": "tokens of the answer, as asked for",
    "generated_tokens": "tokens that came out",
    "cached_tokens": "tokens of the prompt whose keys and values were there already",
    "preemptions": "how often it lost its place",
    "instance": "who served (decoded) it; -1: nobody",
    "group": "data-parallel group of the instance; -1: none",
    "priority": "lower ones go first",
    "topic": "client or conversation; -1: unknown",
    "is_dropped": "whether it was refused",
    "keeps_slo": "whether it was answered within the promise; empty where none was given",
}
"""Column -> meaning; seconds end in _s."""
FORMATS = (".csv", ".parquet")


def check_request_target(path: str | Path) -> None:
    """Refuse a path that the table cannot be written to.

    Raises:
        ValueError: no folder to write to, or a suffix that is not in `FORMATS`.
    """
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"requests: the file must end in {' or '.join(FORMATS)}; given {str(path)!r}")
    check_target(path)


def request_table(results: Sequence[ServingResult]) -> pa.Table:
    """The requests of all set-ups, one below the other."""
    tables = [_table(result) for result in results]
    return pa.concat_tables(tables)


def write_requests(results: Sequence[ServingResult], path: str | Path) -> None:
    """Write the table to a .csv or .parquet file, in one step."""
    check_request_target(path)
    table, buffer = request_table(results), io.BytesIO()
    if Path(path).suffix == ".csv":
        pyarrow.csv.write_csv(table, buffer)
    else:
        pyarrow.parquet.write_table(table, buffer, compression="zstd")
    replace_file(path, buffer.getvalue())


def _table(result: ServingResult) -> pa.Table:
    o, seconds, num = result.outcome, latencies(result.outcome), len(result.outcome.arrival_s_Q)
    promised = result.promises
    slo = Slo(promised.get("ttft"), promised.get("tpot"), promised.get("e2e"))
    values = {
        "setup": [result.name] * num,
        "request": np.arange(num),
        "arrival_s": o.arrival_s_Q,
        "scheduled_s": o.scheduled_s_Q,
        "first_token_s": o.first_token_s_Q,
        "finish_s": o.finish_s_Q,
        **{f"{name}_s": seconds[name] for name in ("queueing", "ttft", "tpot", "e2e")},
        "worst_itl_s": np.where(o.generated_Q > 1, o.worst_itl_s_Q, np.nan),
        "prompt_tokens": o.prompt_Q,
        "output_tokens": o.output_Q,
        "generated_tokens": o.generated_Q,
        "cached_tokens": o.cached_Q,
        "preemptions": o.preempted_Q,
        "instance": o.instance_Q,
        "group": o.group_Q,
        "priority": o.priority_Q,
        "topic": o.topic_Q,
        "is_dropped": o.dropped_Q,
        "keeps_slo": keeps_slo(o, slo) if promised else pa.nulls(num, pa.bool_()),
    }
    arrays = [pa.array(values[name], from_pandas=True) for name in COLUMNS]  # NaN is null
    fields = [
        pa.field(name, array.type, metadata={"meaning": COLUMNS[name]})
        for name, array in zip(COLUMNS, arrays, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))
