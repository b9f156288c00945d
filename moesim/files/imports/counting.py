"""Tables of expert counts, of several layouts, as count traces."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.files.imports.arrays import read_arrays
from moesim.files.imports.facts import Facts
from moesim.files.imports.text import raise_first, read_json, read_text
from moesim.files.imports.tokens import MAX_LAYER
from moesim.files.tables import raise_all
from moesim.files.trace_rules import MAX_EXPERTS
from moesim.routing.counts import CountTrace

_NAMES = ("weight", "counts", "load", "")
"""Names an array of an EPLB table may have, "" for a file that is one array."""


def count_trace(
    paths: Sequence[Path], facts: Facts, counts_WLE: NDArray[Any], layers: Sequence[int], windows: str
) -> CountTrace:
    """A count trace of an array [W, L, E], checked.

    Args:
        windows: what the windows are, for the provenance.

    Raises:
        ValueError: the counts break a rule, or nobody says K.
    """
    where = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files"
    if 0 in counts_WLE.shape:
        raise ValueError(f"{where}: there are no counts in it, {list(counts_WLE.shape)}; count some tokens")
    if facts.num_experts not in (None, counts_WLE.shape[2]):
        raise ValueError(
            f"{where}: has {counts_WLE.shape[2]} experts a layer, --num-experts says {facts.num_experts}; leave it out"
        )
    if facts.top_k is None:
        most = int((counts_WLE.sum(axis=2) // np.maximum(counts_WLE.max(axis=2), 1)).min())
        raise ValueError(
            f"{where}: counts do not say how many experts a token chose; give --top-k K, the router's "
            f"(at most {max(most, 1)}, as no expert may have more than 1/K of its layer's counts)"
        )
    trace = CountTrace(
        name=facts.name_of(paths),
        model=facts.model_name(),
        top_k=facts.top_k,
        counts_WLE=np.ascontiguousarray(counts_WLE, dtype=np.int64),
        layers=tuple(int(layer) for layer in layers),
        provenance=facts.provenance(paths, windows=windows, router=facts.origin or "trained"),
    )
    raise_all(where, trace.mistakes())
    return trace


def one_file(paths: Sequence[Path]) -> Path:
    """The only one of the paths."""
    if len(paths) > 1:
        raise ValueError(f"{paths[1]}: files of counts are converted one by one; give one")
    return paths[0]


def read_eplb(paths: Sequence[Path], facts: Facts) -> CountTrace:
    """Expert-load table as DeepSeek's EPLB takes it: whole numbers [layer, expert], or [window, layer, expert].

    An .npy file; an .npz file with one array, or one called weight, counts or load; a .json of nested lists; a .csv
    without a header, one line a layer. The MoE layers are numbered from 0.
    """
    path = one_file(paths)
    if path.suffix.lower() in (".npy", ".npz"):
        arrays = read_arrays(path)
        names = list(arrays) if len(arrays) == 1 else [name for name in _NAMES if name in arrays]
        if len(names) != 1:
            raise ValueError(f"{path}: needs one array called weight, counts or load; it has {', '.join(arrays)}")
        counts = arrays[names[0]]
    else:
        counts = _nested(path)
    if counts.ndim not in (2, 3) or counts.dtype.kind not in "iuf":
        raise ValueError(
            f"{path}: must hold whole numbers [layer, expert] or [window, layer, expert]; given {counts.dtype} "
            f"{list(counts.shape)}"
        )
    if counts.dtype.kind == "f":
        odd = ~np.isfinite(counts) | (counts != np.floor(counts))
        if odd.any():
            at = [int(i) for i in np.argwhere(odd)[0]]
            raise ValueError(f"{path}: counts must be whole numbers; given {counts[tuple(at)]} at {at}; round them")
    counts_WLE = counts if counts.ndim == 3 else counts[None]
    return count_trace(paths, facts, counts_WLE.astype(np.int64), range(counts_WLE.shape[1]), "as in the source")


def _nested(path: Path) -> NDArray[Any]:
    values = (
        [row for row in csv.reader(read_text(path).splitlines()) if row]
        if path.suffix.lower() == ".csv"
        else read_json(path)
    )
    try:
        return np.array(values, dtype=np.float64 if path.suffix.lower() == ".csv" else None)
    except ValueError as error:
        raise ValueError(f"{path}: must hold rows of numbers of one length, a row for each layer ({error})") from error


def read_smartmoe(paths: Sequence[Path], facts: Facts) -> CountTrace:
    """SmartMoE's training loads (.npz): load [iteration, rank, layer, row, expert] and iteration [iteration].

    Summed over ranks and rows (micro-batches): a window is an iteration.
    """
    path = one_file(paths)
    arrays = read_arrays(path)
    if not {"load", "iteration"} <= arrays.keys():
        raise ValueError(f"{path}: needs the arrays load and iteration; it has {', '.join(arrays) or 'none'}")
    load, iteration = arrays["load"], arrays["iteration"]
    if load.ndim != 5 or load.dtype.kind not in "iu" or iteration.shape != load.shape[:1]:
        raise ValueError(
            f"{path}: load must be of whole numbers [iteration, rank, layer, row, expert] and iteration as long; given "
            f"{load.dtype} {list(load.shape)} and {list(iteration.shape)}"
        )
    counts_WLE = load.sum(axis=(1, 3), dtype=np.int64)
    windows = f"training iterations {', '.join(map(str, iteration.tolist()))}"
    return count_trace(paths, facts, counts_WLE, range(counts_WLE.shape[1]), windows)


def read_counts_csv(paths: Sequence[Path], facts: Facts) -> CountTrace:
    """Counts one a line (.csv with a header): layer, expert, count, and window where there are several.

    Any other column tells apart what does not belong together (model, text, ...): --select COLUMN=VALUE must leave one
    value of it. What is not listed was counted 0 times.
    """
    path = one_file(paths)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    header = list(reader.fieldnames or ())
    rows = [(reader.line_num, row) for row in reader]
    keys = [*(["window"] if "window" in header else []), "layer", "expert", "count"]
    mistakes = [f"column {name} lacks; the file has {', '.join(header)}" for name in keys if name not in header]
    others = [name for name in header if name not in keys]
    for name, value in facts.select.items():
        if name not in others:
            mistakes.append(
                f"--select {name}={value}: no such column to select by; one of {', '.join(others)} would do"
            )
    raise_all(str(path), mistakes)
    for name, value in facts.select.items():
        known = sorted({str(row[name]) for _, row in rows})
        rows = [(line, row) for line, row in rows if row[name] == value]
        if not rows:
            raise ValueError(f"{path}: no line is left with {name}={value}; column {name} has {_few(known)}")
    left = {name: sorted({str(row[name]) for _, row in rows}) for name in others}
    mistakes = [
        f"column {name} has {len(values)} values, {_few(values)}; choose one with --select {name}=VALUE"
        for name, values in left.items()
        if len(values) > 1
    ]
    raise_all(str(path), mistakes)
    return _from_lines(path, facts, keys, rows)


def _few(values: Sequence[str]) -> str:
    return ", ".join(values[:8]) + (", ..." if len(values) > 8 else "")


def _from_lines(
    path: Path, facts: Facts, keys: Sequence[str], rows: Sequence[tuple[int, dict[str, Any]]]
) -> CountTrace:
    mistakes: list[str] = []
    cells: dict[tuple[int, int, int], int] = {}
    for line, row in rows:
        bad = [key for key in keys if not (row[key] or "").strip().isdecimal()]
        if None in row or bad:
            given = ", ".join(f"{key} {row[key]!r}" for key in bad) or "more cells than the header"
            mistakes.append(
                f"line {line}: must hold whole numbers, none negative, under {', '.join(keys)}; given {given}"
            )
            continue
        *window, layer, expert, count = (int(row[key]) for key in keys)
        cell = (window[0] if window else 0, layer, expert)
        if layer > MAX_LAYER or expert >= MAX_EXPERTS or max(count, *window, 0) >= 2**62:
            mistakes.append(
                f"line {line}: layer must be at most {MAX_LAYER}, expert at most {MAX_EXPERTS - 1}, window and count "
                f"below 2^62; given {', '.join(f'{key} {row[key]}' for key in keys)}"
            )
        if cell in cells:
            mistakes.append(f"line {line}: (window, layer, expert) {cell} is given a second time; keep one line")
        cells[cell] = count
    raise_first(path, mistakes)
    if not cells:
        raise ValueError(f"{path}: has no lines below the header; count some tokens")
    window_N, layer_N, expert_N = np.array(list(cells)).T
    layers, layer_index_N = np.unique(layer_N, return_inverse=True)
    windows, window_index_N = np.unique(window_N, return_inverse=True)
    num_experts = facts.num_experts or int(expert_N.max()) + 1
    if expert_N.max() >= num_experts:
        raise ValueError(f"{path}: column expert must be below --num-experts {num_experts}; given {expert_N.max()}")
    counts_WLE = np.zeros((len(windows), len(layers), num_experts), np.int64)
    counts_WLE[window_index_N, layer_index_N, expert_N] = list(cells.values())
    return count_trace([path], facts, counts_WLE, layers.tolist(), f"{len(windows)}, as in the source")
