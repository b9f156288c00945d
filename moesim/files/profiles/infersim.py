"""Import of InferSim's kernel timings (Apache-2.0): OPERATOR/[PHASE/]DEVICE/FILE.csv, in microseconds.

A file of attention carries its shape in its name: heads-kvheads-headdim for "mha", heads-latent-rope for "mla". Grouped
products are of evenly loaded experts, gate and up in one (n = 2 x inter), and down. Products are DeepGEMM's, in fp8
with a scale for each 128 x 128 block. Sparse attention (dsa) and gated delta nets (gdn) are not read.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from moesim.costs.measured import MeasuredTable
from moesim.files.profiles.imported import Imported, merged, split

DECODE_HEAD = ["dtype", "kv_dtype", "batch_size", "kv_len", "latency_us", "mfu"]

Row = dict[str, str]
Entry = tuple[str, str, dict[str, float], dict[str, str], float]
"""Operator, format, coordinates, facts, microseconds."""


def _gemm(row: Row, _: Path) -> list[Entry]:
    return [("gemm", "fp8_block", {name: _positive(row, name) for name in "mnk"}, {}, _positive(row, "latency_us"))]


def _positive(row: Row, name: str) -> float:
    value = float(row[name])
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, not {row[name]}")
    return value


def _grouped_gemm(row: Row, where: Path) -> list[Entry]:
    hidden, inter = _positive(row, "hidden_size"), _positive(row, "intermediate_size")
    shape = {"num_experts": _positive(row, "num_local_experts"), "m": _positive(row, "tokens_per_expert")}
    facts = {"phase": where.parts[1], "distribution": "balanced"}
    return [
        ("grouped_gemm", "fp8_block", {**shape, "n": 2 * inter, "k": hidden}, facts, _positive(row, "up_proj_us")),
        ("grouped_gemm", "fp8_block", {**shape, "n": hidden, "k": inter}, facts, _positive(row, "down_proj_us")),
    ]


def _attention(row: Row, where: Path) -> list[Entry]:
    kind, phase = where.parts[:2]
    sides = where.stem.split("-")
    if phase not in ("prefill", "decode") or len(sides) != 3:
        raise ValueError(f"the path must be {kind}/prefill|decode/DEVICE/HEADS-KVHEADS-HEADDIM.csv")
    heads, second, third = map(float, sides)
    shape = {"num_heads": heads}
    facts = {"head_dims": where.stem}
    if kind == "mha":
        shape |= {"num_kv_heads": second, "head_dim": third}
        facts = {}
    op = {"mha": "attention", "mla": "mla"}[kind]
    if phase == "prefill":
        point = {"batch_size": 1.0, **shape, "seq_len": _positive(row, "seq_len")}
        return [(f"context_{op}", row["dtype"], point, facts, _positive(row, "latency_us"))]
    point = {"batch_size": _positive(row, "batch_size"), **shape, "kv_len": _positive(row, "kv_len")}
    return [(f"generation_{op}", row["kv_dtype"], point, facts, _positive(row, "latency_us"))]


READERS: dict[str, Callable[[Row, Path], list[Entry]]] = {
    "gemm": _gemm,
    "grouped_gemm": _grouped_gemm,
    "mha": _attention,
    "mla": _attention,
}


def import_infersim(directory: Path) -> Imported:
    """The tables under `directory`.

    Raises:
        ValueError: there are none, or a file lacks a column or has a value that is no number.
    """
    found = Imported()
    entries: dict[str, list[Entry]] = {}
    paths = sorted(path for path in directory.rglob("*.csv") if len(path.relative_to(directory).parts) in (3, 4))
    if not paths:
        raise ValueError(f"{directory}: no OPERATOR/[PHASE/]DEVICE/FILE.csv; give the folder of the operators")
    for path in paths:
        where = path.relative_to(directory)
        reader = READERS.get(where.parts[0])
        if reader is None:
            found.left_out.append(f"{where.as_posix()}: an operator that has no use here")
            continue
        rows = _rows(path)
        for number, row in rows.items():
            try:
                entries.setdefault(path.parts[-2], []).extend(reader(row, where))
            except KeyError as error:
                raise ValueError(f"{path}: line {number}: column {error} lacks; fetch the file again") from error
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}; fetch the file again") from error
        found.read.append(f"{where.as_posix()}: {len(rows)} rows")
    for device, given in entries.items():
        found.tables[f"{device}/infersim"] = _tables(device, given)
    return found


def _rows(path: Path) -> dict[int, Row]:
    """Rows by the number of their line. One of the files of decode attention has lost its head."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = dict(enumerate(csv.reader(file), start=1))
    head = lines.pop(1) if lines and not any("." in word for word in lines[1]) else DECODE_HEAD
    return {number: dict(zip(head, line, strict=False)) for number, line in lines.items()}


def _tables(device: str, entries: list[Entry]) -> list[MeasuredTable]:
    provenance = {
        "source": "InferSim, bench_data",
        "licence": "Apache-2.0",
        "driver": "not said",
        "library_versions": "DeepGEMM, FlashMLA, FlashInfer, FlashAttention-3; versions not said",
        "date": "not said",
    }
    keys = pa.array([repr((op, dtype, tuple(where), sorted(facts.items()))) for op, dtype, where, facts, _ in entries])
    tables = []
    for _, which in split({"key": keys}):
        op, dtype, where, facts, _ = entries[which[0]]
        points = np.array([list(entries[row][2].values()) for row in which])
        seconds = np.array([entries[row][4] for row in which]) * 1e-6
        facts = {"backend": "infersim", **facts}
        tables.append(
            MeasuredTable(op, dtype, device, tuple(where), *merged(points, seconds), facts=facts, provenance=provenance)
        )
    return tables
