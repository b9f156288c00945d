"""Import of NVIDIA aiconfigurator's measured tables (Apache-2.0): [data/]SYSTEM/FAMILY/BACKEND/VERSION/TABLE.parquet.

Traps of that data, and what is done: message sizes are in elements of the format, not bytes; the same shape may be
there more than once (the median is taken); evenly loaded rows over several ranks ("balanced", ep > 1) contradict the
uneven ones and are left out; a table that is the same to the last digit as another system's is a copy and is left out;
DeepEP's notify times are waiting for stragglers and are not read; whole modules are no operators and are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moesim.costs.measured import MeasuredTable
from moesim.costs.work import weight_bytes
from moesim.files.profiles.imported import Imported, merged, split

Floats = NDArray[np.float64]

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
OPS = {"alltoall": "all_to_all", "mla_gen_pre": "mla_bmm_pre", "mla_gen_post": "mla_bmm_post"}
UNSOUND = {("b200_sxm", "attention", "sglang", "context_attention_perf"): "long prefills beat the device's peak"}


@dataclass(frozen=True)
class Layout:
    """How one of their tables is read.

    Attributes:
        op: our operator, or "" where the column op_name says it.
        dtype: column of the format, or "" where there is none (bf16).
        axes: ours -> their column.
        latency: their column, and how many of its units make a second.
        facts: ours -> their column, those of them that the table has.
    """

    op: str
    dtype: str
    axes: Mapping[str, str]
    latency: tuple[str, float] = ("latency", 1e3)
    facts: Mapping[str, str] = field(default_factory=dict)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_MOE = {
    **_same("num_tokens", "hidden_size", "inter_size"),
    **{"top_k": "topk", "num_experts": "num_experts", "tp": "moe_tp_size", "ep": "moe_ep_size"},
}
_HEADS = {**_same("batch_size", "num_heads", "head_dim"), "num_kv_heads": "num_key_value_heads"}
_MLA = _same("batch_size", "num_heads")
_DEEPEP = {**_same("node_num", "hidden_size", "num_experts"), "num_tokens": "num_token", "top_k": "num_topk"}
_CACHE = {"cache_dtype": "kv_cache_dtype", "window": "window_size"}
_SKEW = {"distribution": "distribution"}

LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "gemm_perf": (Layout("gemm", "gemm_dtype", _same("m", "n", "k")),),
    "moe_perf": (Layout("moe", "moe_dtype", _MOE, facts=_SKEW),),
    "wideep_moe_perf": (
        Layout("wideep_moe", "moe_dtype", {**_MOE, "num_slots": "num_slots"}, facts={**_SKEW, "balancer": "op_name"}),
    ),
    "wideep_context_moe_perf": (Layout("wideep_moe", "moe_dtype", _MOE, facts={**_SKEW, "phase": "op_name"}),),
    "wideep_generation_moe_perf": (Layout("wideep_moe", "moe_dtype", _MOE, facts={**_SKEW, "phase": "op_name"}),),
    "context_attention_perf": (Layout("context_attention", "attn_dtype", {**_HEADS, "seq_len": "isl"}, facts=_CACHE),),
    "generation_attention_perf": (
        Layout("generation_attention", "kv_cache_dtype", {**_HEADS, "kv_len": "kv_len"}, facts=_CACHE),
    ),
    "context_mla_perf": (Layout("context_mla", "mla_dtype", {**_MLA, "seq_len": "isl"}, facts=_CACHE),),
    "generation_mla_perf": (Layout("generation_mla", "kv_cache_dtype", {**_MLA, "kv_len": "kv_len"}, facts=_CACHE),),
    "mla_bmm_perf": (Layout("", "bmm_dtype", {"num_heads": "num_heads", "m": "num_tokens"}),),
    "nccl_perf": (Layout("", "nccl_dtype", _same("num_gpus", "message_bytes")),),
    "custom_allreduce_perf": (Layout("all_reduce", "allreduce_dtype", _same("num_gpus", "message_bytes")),),
    "wideep_deepep_ll_perf": tuple(
        Layout(op, "", _DEEPEP, (f"{op}_avg_t_us", 1e6), {"mode": "op_name"}) for op in ("dispatch", "combine")
    ),
    "wideep_deepep_normal_perf": tuple(
        Layout(op, "", {**_DEEPEP, "num_sms": f"{op}_sms"}, (f"{op}_transmit_us", 1e6), {"mode": "op_name"})
        for op in ("dispatch", "combine")
    ),
}


def files_of_systems(directory: Path) -> Iterator[Path]:
    """Files of tables under `directory` or, where there is one, its folder data."""
    within = directory / "data"
    return (within if within.is_dir() else directory).glob("*/*/*/*/*.parquet")


def import_aiconfigurator(directory: Path, systems: tuple[str, ...] = (), names: tuple[str, ...] = ()) -> Imported:
    """The tables under `directory` or its folder data; only those systems and tables, where any are named.

    Raises:
        ValueError: there are none, or a file is no Parquet or lacks columns.
    """
    found = Imported()
    paths = [
        path
        for path in sorted(files_of_systems(directory))
        if (not systems or path.parts[-5] in systems) and (not names or path.stem in names)
    ]
    if not paths:
        asked = f" of {', '.join((*systems, *names))}" if systems or names else ""
        raise ValueError(
            f"{directory}: no SYSTEM/FAMILY/BACKEND/VERSION/TABLE.parquet{asked}; give the folder of systems"
        )
    for path in paths:
        system, family, backend, version = path.parts[-5:-1]
        where = "/".join(path.parts[-5:])
        if path.stem not in LAYOUTS:
            found.left_out.append(f"{where}: not one operator, or one that has no use here")
            continue
        if because := UNSOUND.get((system, family, backend, path.stem)):
            found.left_out.append(f"{where}: {because}")
            continue
        rows = _rows(path)
        if original := _original(path, rows):
            found.left_out.append(f"{where}: its times are a copy of those of {original}")
            continue
        kept = _kept(rows, path.stem, where, found)
        tables = [table for layout in LAYOUTS[path.stem] for table in _tables(kept, layout, path)]
        found.tables[f"{system}/{backend}-{version}/{path.stem.removesuffix('_perf')}"] = tables
        points = sum(len(table.seconds_N) for table in tables)
        found.read.append(f"{where}: {rows.num_rows} rows, {points} points in {len(tables)} tables")
    return found


def _rows(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error}); fetch it again") from error


def _original(path: Path, rows: pa.Table) -> str | None:
    """The system before this one whose table has the same times to the last digit, whether it was asked for or not."""
    times = [name for name in rows.column_names if name == LAYOUTS[path.stem][0].latency[0]]
    for other in sorted(path.parents[4].glob("/".join(("*", *path.parts[-4:])))):
        if other < path and rows.num_rows and rows.select(times).equals(_rows(other, times)):
            return other.parts[-5]
    return None


def _kept(rows: pa.Table, name: str, where: str, found: Imported) -> pa.Table:
    """Rows whose meaning is known, with the columns that are made of others."""

    def drop(condition: pc.Expression, because: str) -> None:
        nonlocal rows
        before = rows.num_rows
        rows = rows.filter(~condition)
        if rows.num_rows < before:
            found.left_out.append(f"{where}: {before - rows.num_rows} rows, {because}")

    if name == "moe_perf":
        drop(
            (pc.field("distribution") == "balanced") & (pc.field("moe_ep_size") > 1),
            "evenly loaded over several ranks: they contradict the uneven ones",
        )
    if name.startswith("context_"):
        drop(pc.field("step") > 0, "prefill after a cached prefix")
    if name.startswith("generation_") and {"isl", "step"} <= {*rows.column_names}:
        rows = rows.append_column("kv_len", pc.add(rows["isl"], rows["step"]))
    if name.endswith("_attention_perf") and "window_size" not in rows.column_names:  # as older versions wrote them
        rows = rows.append_column("window_size", pa.array([0] * rows.num_rows))
    if "message_size" in rows.column_names:
        column = next(name for name in rows.column_names if name.endswith("_dtype"))
        width = [weight_bytes(DTYPES.get(str(dtype), str(dtype))) for dtype in rows[column].to_pylist()]
        rows = rows.append_column("message_bytes", pc.multiply(rows["message_size"], pa.array(width)))
    return rows


def _tables(rows: pa.Table, layout: Layout, path: Path) -> list[MeasuredTable]:
    latency, per_second = layout.latency
    wanted = [*layout.axes.values(), latency, "device", "op_name", *([layout.dtype] if layout.dtype else [])]
    if lacking := [name for name in wanted if name not in rows.column_names]:
        raise ValueError(f"{path}: columns {', '.join(lacking)} lack; the file has {', '.join(rows.column_names)}")
    system, _, backend, version = path.parts[-5:-1]
    given = {"op_name": "op_name", "kernel": "kernel_source", "implementation": "backend", **layout.facts}
    if layout.dtype:
        given["dtype"] = layout.dtype
    words = {
        ours: rows[theirs].cast(pa.string()).combine_chunks()
        for ours, theirs in given.items()
        if theirs in rows.column_names
    }
    points = np.stack([np.asarray(rows[name].to_numpy(), np.float64) for name in layout.axes.values()], axis=1)
    seconds = np.asarray(rows[latency].to_numpy(), np.float64) / per_second
    usable = np.isfinite(seconds) & (seconds > 0) & (points > 0).all(axis=1)
    provenance = {
        "source": f"NVIDIA aiconfigurator, {'/'.join(path.parts[-5:])}",
        "licence": "Apache-2.0",
        "driver": "not said",
        "library_versions": f"{backend} {version}",
        "date": "not said",
    }
    tables = []
    for facts, which in split({name: column.filter(pa.array(usable)) for name, column in words.items()}):
        op, dtype = facts.pop("op_name", ""), facts.pop("dtype", "bfloat16")
        if "cache_dtype" in facts:
            facts["cache_dtype"] = DTYPES.get(facts["cache_dtype"], facts["cache_dtype"])
        facts = {"backend": backend, "version": version, **facts}
        tables.append(
            MeasuredTable(
                layout.op or OPS.get(op, op), DTYPES.get(dtype, dtype), system, tuple(layout.axes),
                *merged(points[usable][which], seconds[usable][which]), facts=facts, provenance=provenance,
            )
        )  # fmt: skip
    return tables
