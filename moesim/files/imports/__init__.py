"""Routing from elsewhere: readers of other tools' recordings, each of which makes a routing trace or a count trace.

`FORMATS` is the registry: a reader's docstring says the layout it reads. Which one a file is of is told from its suffix
and from the names of its arrays, columns or keys, where these leave one.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesim.files.counts import is_count_file, read_counts
from moesim.files.imports.arrays import array_names, read_npz
from moesim.files.imports.counting import one_file, read_counts_csv, read_eplb, read_smartmoe
from moesim.files.imports.facts import PHASES, Facts
from moesim.files.imports.rows import read_rows
from moesim.files.imports.sglang import read_sglang
from moesim.files.imports.text import first_line, read_json
from moesim.files.imports.tokens import concatenated
from moesim.files.imports.vllm import read_vllm
from moesim.files.keys import nearest
from moesim.files.traces import read_trace
from moesim.routing.counts import CountTrace
from moesim.routing.trace import RoutingTrace

TRACE_SUFFIXES = (".parquet", ".arrow")


def read_moesim(paths: Sequence[Path], facts: Facts) -> RoutingTrace | CountTrace:
    """Trace or count trace of moesim's own (.parquet); what it says of itself stays, but for --name and --model."""
    new: dict[str, Any] = {key: value for key in ("name", "model") if (value := getattr(facts, key))}
    if is_count_file(paths[0]):
        return replace(read_counts(one_file(paths)), **new)
    traces = [replace(read_trace(path), **new) for path in paths]
    return replace(concatenated(paths, traces, facts), **new)


@dataclass(frozen=True)
class Format:
    """A reader, how to know its files (by suffix and names inside), and which facts it takes beside name and model."""

    read: Callable[[Sequence[Path], Facts], RoutingTrace | CountTrace]
    recognises: Callable[[str, frozenset[str]], bool]
    takes: tuple[str, ...]

    @property
    def summary(self) -> str:
        """First line of the reader's docstring."""
        return (self.read.__doc__ or "").strip().splitlines()[0]


_TOKENS, _COUNTS = ("origin", "num_experts", "phase"), ("origin", "num_experts", "top_k")
FORMATS: dict[str, Format] = {
    "moesim": Format(read_moesim, lambda suffix, _: suffix in TRACE_SUFFIXES, ()),
    "npz": Format(read_npz, lambda suffix, names: suffix == ".npz" and {"expert_ids", "position"} <= names, _TOKENS),
    "sglang": Format(
        read_sglang,
        lambda suffix, names: suffix in (".pt", ".pth") or bool({"logical_count", "records"} & names),
        ("origin", "num_experts", "top_k"),
    ),
    "vllm": Format(
        read_vllm,
        lambda suffix, names: suffix.startswith(".json") and bool({"routed_experts", "outputs"} & names),
        ("origin", "num_experts"),
    ),
    "rows": Format(
        read_rows,
        lambda suffix, names: suffix in (".csv", ".jsonl") and bool({"experts", "request"} & names),
        _TOKENS,
    ),
    "eplb": Format(
        read_eplb,
        lambda suffix, names: suffix == ".npy" or "numbers" in names or (suffix == ".npz" and "weight" in names),
        _COUNTS,
    ),
    "smartmoe": Format(
        read_smartmoe, lambda suffix, names: suffix == ".npz" and {"load", "iteration"} <= names, _COUNTS
    ),
    "counts": Format(
        read_counts_csv, lambda suffix, names: suffix == ".csv" and {"expert", "count"} <= names, (*_COUNTS, "select")
    ),
}


def import_routing(
    paths: Sequence[str | os.PathLike[str]],
    *,
    name: str | None = None,
    model: str | None = None,
    origin: str | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    phase: str | None = None,
    select: Mapping[str, str] | None = None,
    format: str | None = None,
) -> RoutingTrace | CountTrace:
    """Routing that another tool recorded, as a trace; expert counts without tokens, as a count trace.

    Args:
        paths: source files of one format; those of tokens make one trace, later files' requests after earlier ones'.
        name: of the trace; the file's, or the folder's for several files, where not given.
        model: whose router this is; "unknown" where not given.
        origin: "trained" or "random", of the router; "trained" where not given. A moesim trace keeps its own.
        num_experts: E, for sources that do not say it.
        top_k: K, for counts, which do not say it.
        phase: "prefill" or "decode", of every token, for sources that do not say it; where not given, requests that
            start at position 0 are prefill, others decode.
        select: column -> value to keep, for tables that hold several models or texts.
        format: one of `FORMATS`; told from the file where not given.

    Raises:
        ValueError: a source is missing or broken, is of no known format, or needs a fact that was not given; one
            message, with the file, what was given and what would do.
    """
    sources = [Path(path) for path in paths]
    if not sources:
        raise ValueError("no source files; give at least one")
    for path in sources:
        if not path.is_file():
            raise ValueError(f"{path}: no such file" if not path.exists() else f"{path}: a folder; give files in it")
    facts = Facts(name, model, origin, num_experts, top_k, phase, dict(select or {}))
    for key, value, known in (("origin", origin, ("trained", "random")), ("phase", phase, PHASES)):
        if value not in (None, *known):
            raise ValueError(f"{key} must be {' or '.join(known)}; given {value!r}")
    if format is not None and format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; {nearest(format, FORMATS)}")
    format = format or _one_format(sources)
    reader = FORMATS[format]
    for key in ("origin", "num_experts", "top_k", "phase", "select"):
        if getattr(facts, key) and key not in reader.takes:
            raise ValueError(
                f"{sources[0]}: files of format {format} take no --{key.replace('_', '-')}; leave it out"
                + (
                    f" (they take {', '.join('--' + k.replace('_', '-') for k in reader.takes)})"
                    if reader.takes
                    else ""
                )
            )
    return reader.read(sources, facts)


def _one_format(paths: Sequence[Path]) -> str:
    """The format that all files are of."""
    found = {}
    for path in paths:
        suffix, names = path.suffix.lower(), _names(path)
        fitting = [name for name, reader in FORMATS.items() if reader.recognises(suffix, names)]
        if len(fitting) != 1:
            seen = f"it has {', '.join(sorted(names)[:12])}" if names else "nothing in it tells"
            known = "\n".join(f"  {name}: {reader.summary}" for name, reader in FORMATS.items())
            number = "more than one" if fitting else "no"
            raise ValueError(f"{path}: of {number} known format ({seen}); say which with --format:\n{known}")
        found[fitting[0]] = path
    if len(found) > 1:
        said = ", ".join(f"{path.name} of {name}" for name, path in found.items())
        raise ValueError(f"the sources are of different formats: {said}; convert them one by one")
    return next(iter(found))


def _names(path: Path) -> frozenset[str]:
    """Names of a file's arrays, columns or keys, as far as they tell its format; "numbers" for a table of numbers."""
    suffix = path.suffix.lower()
    if suffix == ".npz":
        names = array_names(path)
        return frozenset(names if len(names) > 1 or "logical_count" in names else ["numbers"])
    if suffix == ".csv":
        cells = [cell.strip() for cell in next(csv.reader([first_line(path)]), [])]
        return frozenset(cells) if not all(_is_number(cell) for cell in cells) else frozenset(["numbers"])
    if suffix not in (".json", ".jsonl"):
        return frozenset()
    if suffix == ".json":
        value = read_json(path)
    else:
        try:
            value = json.loads(first_line(path) or "null")
        except (json.JSONDecodeError, RecursionError):
            value = None
    while isinstance(value, list) and value:
        value = value[0]
        if isinstance(value, int | float):
            return frozenset(["numbers"])
    return frozenset(value) if isinstance(value, dict) else frozenset()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
