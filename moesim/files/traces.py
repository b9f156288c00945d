"""Routing traces as Parquet or Arrow: one row per (token, layer), so that a trace opens in any table tool.

Parquet is small, and its pages have checksums; an `.arrow` file (the IPC format, not compressed) is many times larger
and opens in a fraction of the time, as it is mapped into memory as it stands.
Rows are sorted by (request, position, layer). What is true of the whole trace (name, model, origin, number of
experts, provenance) is JSON in the schema metadata under the key `moesim`. The reader believes nothing: it
checks every rule and reports all mistakes of a file at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from moesim.files.trace_rows import mistakes_of_rows, to_trace
from moesim.files.trace_rules import trace_mistakes
from moesim.files.trace_table import LISTS, header_facts, read_columns, read_header, to_table
from moesim.routing.trace import RoutingTrace

ROWS_PER_GROUP = 1 << 18
ARROW_SUFFIX = ".arrow"
_ARROW_MAGIC = b"ARROW1"


def write_trace(trace: RoutingTrace, path: str | os.PathLike[str]) -> None:
    """Write `trace` to `path`; the file appears whole or not at all.

    Raises:
        ValueError: the trace breaks a rule (all mistakes are listed), or the file cannot be written.
    """
    with TraceWriter(path) as writer:
        writer.append(trace)


class TraceWriter:
    """Writes a trace in parts, in memory bounded by one part.

    The rows lie in a temporary file beside `path` until the `with` block ends well; then it takes the name.
    The first part fixes the header, the layers and the columns; a later part must agree and hold later
    requests only.

    Args:
        path: the file to write; Arrow if the name ends in .arrow, else Parquet.
        keep_parts: when the `with` block ends with an exception, keep the parts written so far as a whole file,
            if there are any. A killed process leaves no such file: both formats are read from their end.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep_parts: bool = False) -> None:
        self.path = Path(path)
        self._keep_parts = keep_parts
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._as_arrow = self.path.suffix == ARROW_SUFFIX
        self._writer: pq.ParquetWriter | pa.ipc.RecordBatchFileWriter | None = None
        self._first: tuple[object, ...] = ()
        self._last_request = -1
        self.num_parts = 0

    def __enter__(self) -> TraceWriter:
        return self

    def append(self, part: RoutingTrace) -> None:
        """Write the rows of `part`.

        Raises:
            ValueError: the part breaks a rule, disagrees with the first one, or the file cannot be written.
        """
        mistakes = trace_mistakes(part) or self._disagreements(part)
        if mistakes:
            raise ValueError(_report(self.path, mistakes))
        table = to_table(part)
        try:
            if self._writer is None:
                self._writer = _open(self._temporary, table.schema, self._as_arrow)
            if self._as_arrow:
                self._writer.write_table(table)  # in one piece, so that it can be read without a copy
            else:
                self._writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.path}: cannot write the trace: {error}; choose a writable folder") from error
        self._first = self._first or _agreed(part)
        self._last_request = int(part.request_T[-1])
        self.num_parts += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ends_well = kind is None
        if self._writer is not None:
            try:
                self._writer.close()
                ends_well = ends_well or (self._keep_parts and self.num_parts > 0)
            except (OSError, pa.ArrowException):  # a full disk: what lies there cannot be read
                if ends_well:
                    self._temporary.unlink(missing_ok=True)
                    raise
        if not ends_well:
            self._temporary.unlink(missing_ok=True)
        elif self._writer is None:
            raise ValueError(f"{self.path}: the trace is empty; append at least one part before closing")
        else:
            try:
                self._temporary.replace(self.path)
            except OSError as problem:
                self._temporary.unlink(missing_ok=True)
                raise ValueError(f"{self.path}: cannot write the trace: {problem}; choose a file name") from problem

    def _disagreements(self, part: RoutingTrace) -> list[str]:
        if not self._first:
            return []
        names = (
            "header",
            "layers",
            "experts per token and id type",
            "weights column",
            "predicted_ids columns",
            "scores column",
            "token_id column",
        )
        found = [
            f"{name}: every part must agree with the first, {first!r}; given {given!r}"
            for name, first, given in zip(names, self._first, _agreed(part), strict=True)
            if first != given
        ]
        if part.request_T[0] <= self._last_request:
            found.append(
                f"column request: a part must hold later requests than {self._last_request}, the last "
                "one written; "
                f"given {part.request_T[0]}; append whole requests in order"
            )
        return found


def read_trace(path: str | os.PathLike[str]) -> RoutingTrace:
    """The trace in the file `path`, checked against every rule.

    Of a `.arrow` file the arrays are views of the memory-mapped file, as long as it was written in one part: only what
    is touched is read.

    Raises:
        ValueError: the file is missing, is no trace, or breaks rules; all mistakes are listed, one a line,
            with column, row, the rule, what was given and what would do.
    """
    path = Path(path)
    table = _load(path)
    header, mistakes = read_header(table)
    columns, found = read_columns(table)
    mistakes += found + mistakes_of_rows(columns, header)
    if mistakes:
        raise ValueError(_report(path, mistakes))
    return to_trace(columns, header)


def _report(path: Path, mistakes: list[str]) -> str:
    lines = "\n".join(f"  {mistake}" for mistake in mistakes)
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return f"{path}: not a right routing trace, {count}:\n{lines}"


def _load(path: Path) -> pa.Table:
    if path.is_dir():
        raise ValueError(f"{path}: a folder; give the name of a .parquet or .arrow file in it")
    if not path.exists():
        raise ValueError(f"{path}: no such file; `moesim list traces` names the traces that come with moesim")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; write the trace again")
    with path.open("rb") as file:
        is_arrow = file.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
    try:
        if is_arrow:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        else:
            table = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True).read()
        table.validate(full=True)
        return table
    except (OSError, ValueError, pa.ArrowException) as error:  # damage shows as any of them
        kind = "Arrow" if is_arrow else "Parquet"
        raise ValueError(
            f"{path}: not a whole {kind} file ({error}); write the trace again, or make one of another "
            "tool's file with `moesim trace convert`"
        ) from error


def _open(path: Path, schema: pa.Schema, as_arrow: bool) -> pq.ParquetWriter | pa.ipc.RecordBatchFileWriter:
    """A writer; that of Parquet codes ids by dictionary and the bytes of weights apart, a tenth smaller together."""
    if as_arrow:
        return pa.ipc.new_file(str(path), schema)
    leaves = {name: f"{name}.list.element" if name in LISTS else name for name in schema.names}
    weights = leaves.pop("weights", None)
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=9,
        use_dictionary=list(leaves.values()),
        column_encoding={weights: "BYTE_STREAM_SPLIT"} if weights else None,
        write_statistics=False,
        write_page_checksum=True,
    )


def _agreed(trace: RoutingTrace) -> tuple[object, ...]:
    """What the parts of one file share."""
    return (
        header_facts(trace),
        trace.layers,
        (trace.top_k, str(trace.expert_ids_TLK.dtype)),
        trace.weights_TLK is not None,
        [(str(ids_TLW.dtype), ids_TLW.shape[2]) for ids_TLW in trace.predicted_HTLW],
        trace.scores_TLE is not None,
        trace.token_id_T is not None,
    )
