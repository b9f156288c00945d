"""A run as a timeline: Chrome trace events, which ui.perfetto.dev opens.

One process per set-up and rank, one track per resource. A track of the viewer can only nest, so records that
overlap on one resource (a shared link) go to further lanes of it. Times are whole nanoseconds: rounding never
makes two slices overlap that did not.
"""

from __future__ import annotations

import gzip
import heapq
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesim.report import replace_file
from moesim.results import Record, Result

MOST_FLOWS = 50_000  # over the whole file; more make the viewer slow
MOST_FLOWS_INTO_ONE = 4  # the last arrivals are those that held a record up

Event = dict[str, Any]
Span = tuple[int, int]


def write_perfetto(results: Sequence[Result], path: str | Path) -> None:
    """Write the records of all results as one trace; a name that ends in .gz is compressed."""
    content = json.dumps(trace(results), separators=(",", ":"), ensure_ascii=False).encode()
    if str(path).endswith(".gz"):
        packed = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
            file.write(content)
        content = packed.getvalue()
    replace_file(path, content)


def trace(results: Sequence[Result]) -> dict[str, Any]:
    """The trace as plain data: metadata first, then slices by time, then the arrows between them."""
    names: list[Event] = []
    slices: list[tuple[int, Event]] = []
    flows: list[Event] = []
    left_out = 0
    next_id = 1  # processes and tracks share one count: no track is ever mistaken for another process's
    for order, result in enumerate(results):
        spans = [_span(record) for record in result.records]
        lanes = _lanes(result.records, spans)
        tracks: dict[tuple[int, str, int], tuple[int, int]] = {}
        processes: dict[int, int] = {}
        for position, key in enumerate(sorted(set(lanes))):
            rank, resource, lane = key
            if rank not in processes:
                processes[rank] = next_id
                next_id += 1
                title = f"{result.name} · rank {rank}"
                names.append(_meta("process_name", processes[rank], 0, {"name": title}))
                sort_index = order * 1_000_000 + rank
                names.append(_meta("process_sort_index", processes[rank], 0, {"sort_index": sort_index}))
            tracks[key] = (processes[rank], next_id)
            next_id += 1
            title = resource if lane == 0 else f"{resource} ({lane + 1})"
            names.append(_meta("thread_name", *tracks[key], {"name": title}))
            names.append(_meta("thread_sort_index", *tracks[key], {"sort_index": position}))
        where = [tracks[lane] for lane in lanes]
        for record, (start, finish), (pid, tid) in zip(result.records, spans, where, strict=True):
            slices.append((start, _slice(record, start, finish, pid, tid)))
        arrows, cut = _flows(result.records, spans, where, MOST_FLOWS // len(results), len(flows))
        flows += arrows
        left_out += cut
    slices.sort(key=lambda pair: pair[0])
    return {
        "displayTimeUnit": "ms",
        "otherData": {"producer": "moesim", "num_flows_left_out": left_out},
        "traceEvents": names + [event for _, event in slices] + flows,
    }


def _span(record: Record) -> Span:
    start, finish = round(record.start_s * 1e9), round(record.finish_s * 1e9)
    if finish < start:
        raise ValueError(f"perfetto: record {record.name!r} of rank {record.rank} finishes before it starts")
    return start, finish


def _lanes(records: Sequence[Record], spans: Sequence[Span]) -> list[tuple[int, str, int]]:
    """(rank, resource, lane) of every record: the lowest lane of its resource that is free when it starts."""
    free: dict[tuple[int, str], list[int]] = {}
    busy: dict[tuple[int, str], list[tuple[int, int]]] = {}
    opened: dict[tuple[int, str], int] = {}
    lanes: list[tuple[int, str, int]] = [(0, "", 0)] * len(records)
    for index in sorted(range(len(records)), key=lambda index: (spans[index], index)):
        record, (start, finish) = records[index], spans[index]
        key = (record.rank, record.resource)
        idle, running = free.setdefault(key, []), busy.setdefault(key, [])
        while running and running[0][0] <= start:
            heapq.heappush(idle, heapq.heappop(running)[1])
        if idle:
            lane = heapq.heappop(idle)
        else:
            lane = opened.get(key, 0)
            opened[key] = lane + 1
        heapq.heappush(running, (finish, lane))
        lanes[index] = (*key, lane)
    return lanes


def _slice(record: Record, start: int, finish: int, pid: int, tid: int) -> Event:
    num_bytes = int(record.num_bytes) if float(record.num_bytes).is_integer() else record.num_bytes
    args = {"layer": record.layer, "phase": record.phase, "step": record.step, "bytes": num_bytes}
    return {
        "ph": "X", "name": record.name, "cat": record.phase, "pid": pid, "tid": tid,
        "ts": _microseconds(start), "dur": (finish - start) / 1000, "args": args,
    }  # fmt: skip


def _flows(
    records: Sequence[Record],
    spans: Sequence[Span],
    where: Sequence[tuple[int, int]],
    most: int,
    first_id: int,
) -> tuple[list[Event], int]:
    """Arrows into each record from the last of those it waited for on other tracks; and how many were cut.

    An arrow leaves in the last nanosecond of its source and arrives in the first of its target, so that both
    ends lie inside a slice; a slice without length cannot hold an end.
    """
    events: list[Event] = []
    left_out = 0
    for target, record in enumerate(records):
        begins, ends = spans[target]
        sources = [index for index in record.after if where[index] != where[target]]
        sources = [index for index in sources if spans[index][0] < min(begins, spans[index][1]) and begins < ends]
        sources.sort(key=lambda index: (-spans[index][1], index))
        kept = sources[: min(MOST_FLOWS_INTO_ONE, most - len(events) // 2)]
        left_out += len(sources) - len(kept)
        for source in kept:
            common = {"name": "waits for", "cat": "wait", "id": first_id + len(events)}
            leaves = _microseconds(min(spans[source][1], begins) - 1)
            (pid, tid), (to_pid, to_tid) = where[source], where[target]
            events.append({**common, "ph": "s", "pid": pid, "tid": tid, "ts": leaves})
            arrives = _microseconds(begins)
            events.append({**common, "ph": "f", "bp": "e", "pid": to_pid, "tid": to_tid, "ts": arrives})
    return events, left_out


def _microseconds(ns: int) -> float:
    """Nanoseconds as microseconds that a reader who cuts off digits turns back into the same nanoseconds."""
    us, part = ns / 1000, ns % 1000
    is_cut = int(us * 1000.0) != ns or int(part / 1000 * 1000.0) != part
    return us + 1e-4 if is_cut else us


def _meta(name: str, pid: int, tid: int, args: dict[str, Any]) -> Event:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}
