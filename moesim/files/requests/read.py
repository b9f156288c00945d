"""Read a file of requests, whichever kind it is: told by its content, not by its name.

Rows are counted from 1, a CSV's header apart. Requests out of order are sorted by arrival, and a note says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moesim.files.keys import nearest
from moesim.files.requests.columns import Columns
from moesim.files.requests.families import FAMILIES, Family, family_of
from moesim.files.requests.raw import read_raw
from moesim.files.tables import raise_all
from moesim.requests import Requests

LATEST_S = 1e9
"""Up to here float64 tells 0.1 us apart; Unix time is beyond."""


@dataclass(frozen=True, eq=False)
class Traffic:
    """What a file says.

    has_times: whether its requests have times of arrival (all are 0 otherwise).
    hint: what would do for the times, where it has none.
    """

    requests: Requests
    has_times: bool
    hint: str = ""


def read_traffic(path: Path) -> Traffic:
    """The requests of a file: CSV, JSON, JSON lines or Parquet, also compressed by gzip.

    Raises:
        ValueError: it is missing, of no known kind, empty, or breaks rules: all mistakes in one message.
    """
    raw = read_raw(path)
    table = raw.table
    family = family_of(table.column_names)
    if family is None:
        raise_all(str(path), _unknown(table.column_names))
        raise AssertionError
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    mistakes = [f"column {name}: must be there once, given twice; leave one of the two out" for name in twice]
    if not table.num_rows:
        mistakes.append("no requests; give one row for each")
    known = (*family.needed, *family.optional, *(family.ignored or ()))
    if family.ignored is not None:
        mistakes += [f"column {x}: unknown; {nearest(x, known)}" for x in table.column_names if x not in known]
    raise_all(str(path), mistakes)
    requests = _requests(Columns(table, mistakes), family)
    raise_all(str(path), mistakes)
    requests = replace(requests, source=f"{path.name} ({raw.kind or family.name})", notes=raw.notes + requests.notes)
    return Traffic(requests, bool(family.arrival), raw.hint)


def _unknown(columns: list[str]) -> list[str]:
    if "conversations" in columns:
        return [
            "conversations are text, and moesim has no tokenizer; count the tokens of each prompt and answer with the "
            "model's own, and write JSON lines with input_tokens and output_tokens"
        ]
    best = max(FAMILIES, key=lambda family: (len(set(family.needed) & set(columns)), family.name == "moesim"))
    lacks = [name for name in best.needed if name not in columns]
    kinds = "; ".join(f"{family.name}: {', '.join(family.needed)}" for family in FAMILIES)
    said = [f"column {name} lacks ({best.name}); the file has {', '.join(columns) or 'none'}" for name in lacks]
    return [*said[:-1], f"{said[-1]}. Known kinds and their columns: {kinds}"]


def _requests(columns: Columns, family: Family) -> Requests:
    """Every column of the family, sorted by arrival."""
    num, names = columns.table.num_rows, columns.table.column_names
    arrival_s = np.zeros(num)
    if family.is_text:
        arrival_s = columns.seconds(family.arrival)
    elif family.arrival:
        arrival_s = columns.numbers(family.arrival)
        if family.is_clock:
            arrival_s = arrival_s - arrival_s.min()
        else:
            columns.refuse(family.arrival, arrival_s < 0, "must not be negative")
        arrival_s = arrival_s * family.unit_s
    if family.arrival:
        late_N = arrival_s > LATEST_S
        columns.refuse(family.arrival, late_N, f"must be at most {LATEST_S:.0e} s from the start, not a clock's time")
    prompt, output = columns.counts(family.prompt, 1), columns.counts(family.output, 1)
    found = Requests.of(arrival_s, prompt, output)
    optional = [name for name in family.optional if name in names]
    if "priority" in optional:
        found = replace(found, priority_Q=columns.counts("priority", -(2**31)))
    if "topic" in optional:
        found = replace(found, topic_Q=columns.counts("topic", -1))
    if family.blocks or "prefix_blocks" in optional:
        found = _with_blocks(found, columns, family)
    return in_order(found)


def _with_blocks(found: Requests, columns: Columns, family: Family) -> Requests:
    """Only blocks that the prompt fills can be shared; ids become 0, 1, ... by their order."""
    size = family.block_tokens
    if not size:
        if "block_tokens" not in columns.table.column_names:
            columns.mistakes.append("column block_tokens lacks; give the tokens of a block of prefix_blocks, as 512")
            return found
        sizes = np.unique(columns.counts("block_tokens", 1))
        if len(sizes) > 1:
            columns.mistakes.append(f"column block_tokens must be the same in all rows, given {sizes[:5].tolist()}")
        size = int(sizes[0])
    start, ids = columns.lists(family.blocks or "prefix_blocks")
    given = np.diff(start)
    kept = np.minimum(given, found.prompt_Q // size)
    place = np.arange(len(ids)) - np.repeat(start[:-1], given)
    dense = np.unique(ids[place < np.repeat(kept, given)], return_inverse=True)[1]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
    return replace(found, block_start_Q=starts, block_ids=dense.astype(np.int64), block_tokens=size)


def in_order(requests: Requests) -> Requests:
    """Sorted by arrival; those of one time stay in their order."""
    arrival_s = requests.arrival_s_Q
    if (np.diff(arrival_s) >= 0).all():
        return requests
    late = int((np.diff(arrival_s) < 0).sum())
    note = f"{late} requests came before the one above them in the file: all were sorted by arrival"
    return replace(requests.take(np.argsort(arrival_s, kind="stable")), notes=(*requests.notes, note))
