"""Rows of text, one for each token and layer, for routing from anywhere."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.files.imports.facts import PHASES, Facts
from moesim.files.imports.text import raise_first, read_text
from moesim.files.imports.tokens import concatenated, routing_trace
from moesim.files.keys import nearest
from moesim.routing.trace import RoutingTrace

REQUIRED, OPTIONAL = ("request", "position", "layer", "experts"), ("weights", "phase", "token_id")
_WHOLE = ("request", "position", "layer", "token_id")


def read_rows(paths: Sequence[Path], facts: Facts) -> RoutingTrace:
    """Rows of text (.csv with a header, or .jsonl), one for each token and layer, in any order.

    Columns (keys), in any order: request, position and layer, whole numbers; experts, K different ids, in a .csv in one
    cell between spaces ("3 17 5"), in a .jsonl a list; and where there are any weights, as experts; phase, prefill or
    decode; token_id. Every token needs a row for every layer that the file has.
    """
    return concatenated(paths, [_read(path, facts) for path in paths], facts)


def _read(path: Path, facts: Facts) -> RoutingTrace:
    mistakes: list[str] = []
    lines: list[int] = []
    rows: list[dict[str, Any]] = []
    for line, given in _lines(path, mistakes):
        row, found = _parsed(given, facts.num_experts)
        if not found and rows and row.keys() != rows[0].keys():
            found = [f"must have the columns of the first row, {', '.join(rows[0])}; given {', '.join(row)}"]
        if not found and rows and len(row["experts"]) != len(rows[0]["experts"]):
            found = [f"must have {len(rows[0]['experts'])} experts, as the first row; given {row['experts']}"]
        mistakes += [f"line {line}: {mistake}" for mistake in found]
        if not found:
            lines.append(line)
            rows.append(row)
    raise_first(path, mistakes)
    if not rows:
        raise ValueError(f"{path}: has no rows; give one for each token and layer")
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    order = np.lexsort((columns["layer"], columns["position"], columns["request"]))
    columns = {name: values[order] for name, values in columns.items()}
    layers = np.unique(columns["layer"])
    raise_first(path, _token_mistakes(columns, layers, np.array(lines)[order]))
    L = len(layers)
    return routing_trace(
        path,
        facts,
        ids_TLK=columns["experts"].reshape(-1, L, columns["experts"].shape[1]),
        request_T=columns["request"][::L],
        position_T=columns["position"][::L],
        is_decode_T=columns["phase"][::L] == "decode" if "phase" in columns else None,
        token_id_T=columns["token_id"][::L] if "token_id" in columns else None,
        num_experts=None,
        layers=layers.tolist(),
        weights_TLK=columns["weights"].reshape(-1, L, columns["weights"].shape[1]) if "weights" in columns else None,
    )


def _lines(path: Path, mistakes: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line number and columns of each row; what is no row becomes a mistake."""
    text = read_text(path)
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        found = _name_mistakes(header)
        mistakes += [f"line 1: {mistake}" for mistake in found]
        for row in [] if found else reader:
            if None in row or None in row.values():
                mistakes.append(f"line {reader.line_num}: must have {len(header)} cells, as the header")
            else:
                yield reader.line_num, {name: _cell(name, value) for name, value in row.items()}
        return
    for line, part in enumerate(text.split("\n"), start=1):
        if not part.strip():
            continue
        try:
            row = json.loads(part)
        except (ValueError, RecursionError) as error:
            mistakes.append(f"line {line}: not JSON ({error})")
            continue
        found = _name_mistakes(list(row)) if isinstance(row, dict) else ["must be an object"]
        mistakes += [f"line {line}: {mistake}" for mistake in found]
        if not found:
            yield line, row


def _name_mistakes(names: Sequence[str]) -> list[str]:
    known = REQUIRED + OPTIONAL
    return [
        *(f"column {name} lacks; given {', '.join(names)}" for name in REQUIRED if name not in names),
        *(f"column {name!r} is unknown; {nearest(name, known)}" for name in names if name not in known),
        *(f"column {name} is there twice" for name in known if names.count(name) > 1),
    ]


def _cell(name: str, text: str) -> Any:
    """The value that a cell of a .csv stands for; the text itself where it stands for none, which is then blamed."""
    kind = float if name == "weights" else int
    if "_" in text:  # which Python's numbers may hold
        return text
    try:
        if name in ("experts", "weights"):
            return [kind(part) for part in text.split()]
        return int(text) if name in _WHOLE else text.strip()
    except ValueError:
        return text


def _parsed(given: Mapping[str, Any], num_experts: int | None) -> tuple[dict[str, Any], list[str]]:
    """The row, in the order of the columns as known here, and what is wrong with it."""
    found = [
        f"column {name} must be a whole number from 0 to {2**31 - 1}; given {given[name]!r}"
        for name in _WHOLE
        if name in given and not _is_whole(given[name])
    ]
    experts = given["experts"]
    if not isinstance(experts, list) or not experts or not all(map(_is_whole, experts)):
        found.append(f"column experts must be whole numbers, at least one; given {experts!r}")
        experts = []
    elif len(set(experts)) < len(experts):
        found.append(f"column experts must not repeat one; given {experts}")
    elif num_experts is not None and max(experts) >= num_experts:
        found.append(f"column experts must be below --num-experts {num_experts}; given {experts}")
    if "weights" in given and not _are_weights(weights := given["weights"], len(experts)):
        found.append(f"column weights must be {len(experts)} numbers of 0 or more, as experts; given {weights!r}")
    if "phase" in given and given["phase"] not in PHASES:
        found.append(f"column phase must be prefill or decode; given {given['phase']!r}")
    return {name: given[name] for name in (*REQUIRED, *OPTIONAL) if name in given}, found


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _are_weights(values: Any, count: int) -> bool:
    """Numbers that a float16 can hold (65,504 at most)."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(v) in (int, float) and math.isfinite(v) and 0 <= v <= 65_504 for v in values)
    )


def _token_mistakes(columns: Mapping[str, NDArray[Any]], layers: NDArray[Any], line_N: NDArray[Any]) -> list[str]:
    """Every token must have every layer once, and one phase and token id; rows are sorted."""
    request_N, position_N, layer_N = columns["request"], columns["position"], columns["layer"]
    starts = np.flatnonzero((np.diff(request_N, prepend=-1) != 0) | (np.diff(position_N, prepend=-1) != 0))
    found = []
    for start, end in zip(starts, [*starts[1:], len(line_N)], strict=True):
        given = layer_N[start:end]
        if len(given) != len(layers) or (given != layers).any():
            lacking = sorted(set(layers.tolist()) - set(given.tolist()))
            twice = [layer for layer in np.unique(given) if (given == layer).sum() > 1]
            said = f"lacks layer {lacking[0]}" if lacking else f"has layer {twice[0]} twice"
            found.append(
                f"line {line_N[start]}: request {request_N[start]} position {position_N[start]} {said}; every token "
                f"needs each of the {len(layers)} layers of the file once"
            )
            continue
        for name in ("phase", "token_id"):
            if name in columns and (differs := columns[name][start:end] != columns[name][start]).any():
                row = start + int(differs.argmax())
                found.append(
                    f"line {line_N[row]}: column {name} must be the same in all rows of a token; given "
                    f"{columns[name][row]} after {columns[name][start]} in line {line_N[start]}"
                )
    return found
