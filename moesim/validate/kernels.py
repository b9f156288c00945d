"""Measured tables of kernels against what was left out of them, and one device against another's table.

Between sizes: along each axis every third of its values is held out, the table is built from the rest, and the rows
held out are predicted. Between devices: a table of one device is taken to another by the ratios of their datasheets,
FLOP where the fitted roofline is bound by arithmetic, bandwidth where by memory, and compared with the other's table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.costs.compute import arithmetic_flops_per_s, efficiency
from moesim.costs.measured import Interpolated, MeasuredTable
from moesim.costs.work import Coordinates, work
from moesim.files.hardware import load_cluster
from moesim.files.profiles.aiconfigurator import import_aiconfigurator
from moesim.hardware import Cluster
from moesim.validate.cases import Case, Validation

Floats = NDArray[np.float64]

CLUSTERS = {"a100_sxm": "dgx-a100", "h100_sxm": "hgx-h100", "h200_sxm": "hgx-h200", "b200_sxm": "hgx-b200"}
FAMILIES = {
    "gemm": "gemm",
    "moe": "moe",
    "wideep_moe": "moe",
    "context_attention": "attention",
    "generation_attention": "attention",
    "context_mla": "mla",
    "generation_mla": "mla",
    "mla_bmm_pre": "mla",
    "mla_bmm_post": "mla",
    "all_reduce": "collectives",
    "all_gather": "collectives",
    "reduce_scatter": "collectives",
    "all_to_all": "collectives",
    "dispatch": "exchange",
    "combine": "exchange",
}
ORDER = ("moe", "gemm", "attention", "mla", "collectives", "exchange")
MODEL_AXES = {"moe": ("hidden_size", "inter_size", "top_k", "num_experts"), "attention": ("head_dim",)}
"""Along these a table was measured at a few models' values: to hold one out is to ask for a model never timed (a head
size, for a kernel never compiled), which is judged apart."""
CASES = 40
"""Held-out rows that are predicted for each table and axis, evenly spaced; all where there are fewer."""
ROWS = 24
"""Tables with fewer rows are not split."""
TRANSFER = ("h100_sxm", "h200_sxm")
AIMS = {"median_abs_error": (0.0, 0.04), "p90_abs_error": (0.0, 0.12), "coverage_90": (0.85, 0.95)}


def validate_kernels(
    directory: Path, devices: Sequence[str] = (), seed: int = 0, say: Callable[[str], None] = lambda line: None
) -> Validation:
    """Both validations on aiconfigurator's tables under `directory`, of those systems (all four where none is named).

    seed: of the offsets at which held-out rows are picked. say: takes a line of progress.

    Raises:
        ValueError: there are no tables of a system.
    """
    rng = np.random.default_rng(seed)
    wanted = tuple(devices) or tuple(CLUSTERS)
    if unknown := [name for name in wanted if name not in CLUSTERS]:
        raise ValueError(f"device must be one of {', '.join(CLUSTERS)}; given {', '.join(unknown)}")
    tables = [table for found in import_aiconfigurator(directory, wanted).tables.values() for table in found]
    cases: list[Case] = []
    rows = 0
    for device in wanted:
        mine = [table for table in tables if table.device == device]
        say(f"{device}: {len(mine)} tables")
        for table in mine:
            for found, held in _held_out(table, load_cluster(CLUSTERS[device]), rng):
                cases += found
                rows += held
    facts = {"held-out rows": rows, "of them predicted": len(cases), "seed": seed}
    if set(TRANSFER) <= set(wanted):
        say(f"{TRANSFER[1]} from {TRANSFER[0]}")
        cases += _transferred(tables, rng)
    return Validation("kernels", tuple(sorted(cases, key=lambda case: _place(case.group))), facts, AIMS)


def _place(group: str) -> tuple[int, ...]:
    """Where a group stands: by device; between sizes, other models, outside, from another device; by operator."""
    device, *rest = group.split(" ")
    family = next(word.removesuffix(",") for word in rest if word.removesuffix(",") in ORDER)
    marks = (" from ", ", outside", ", other models")
    return (tuple(CLUSTERS).index(device), *(mark in group for mark in marks), ORDER.index(family))


def _held_out(table: MeasuredTable, cluster: Cluster, rng: np.random.Generator) -> Iterator[tuple[list[Case], int]]:
    """Cases of every axis, and how many rows were held out for them."""
    if len(table.seconds_N) < ROWS:
        return
    for axis, name in enumerate(table.axes):
        known = np.unique(table.points_ND[:, axis])
        if len(known) < 4:
            continue
        out = np.isin(table.points_ND[:, axis], known[1:-1][::3])
        rows = _pick(np.flatnonzero(out), rng)
        kept = MeasuredTable(
            table.op, table.dtype, table.device, table.axes, table.points_ND[~out], table.seconds_N[~out]
        )
        where = dict(zip(table.axes, table.points_ND[rows].T, strict=True))
        found = kept.seconds(where)
        family = FAMILIES[table.op]
        group = f"{table.device} {family}{', other models' if name in MODEL_AXES.get(family, ()) else ''}"
        said = f"{_title(table)}, without every third {name}"
        yield _cases(said, group, where, table.seconds_N[rows], found, _roofline(table, where, cluster)), int(out.sum())


def _pick(rows: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    step = max(1, len(rows) // CASES)
    return rows[int(rng.integers(step)) :: step][:CASES]


def _title(table: MeasuredTable) -> str:
    return " ".join((table.device, table.op, table.dtype, *table.facts.values()))


def _cases(
    said: str, group: str, where: Coordinates, seconds: Floats, found: Interpolated, baseline: Floats
) -> list[Case]:
    cases = []
    for row, measured in enumerate(seconds):
        point = " ".join(f"{name}={values[row]:.0f}" for name, values in where.items())
        group_of = group if found.inside[row] else f"{group}, outside"
        cases.append(
            Case(
                f"{said}: {point}", float(measured), float(found.seconds[row]), float(found.low[row]),
                float(found.high[row]), False, group_of, float(baseline[row]),
            )
        )  # fmt: skip
    return cases


def _roofline(table: MeasuredTable, where: Coordinates, cluster: Cluster) -> Floats:
    """Datasheet and the efficiencies of the device's file, and one launch; links for what goes between devices."""
    flops, num_bytes = work(table.op, table.dtype, where)
    family, device = FAMILIES[table.op], cluster.device
    if family in ("collectives", "exchange"):
        rate = cluster.scale_up.bytes_per_s * efficiency(device, "network", "value")
        return np.asarray(device.launch_s + num_bytes / rate)
    kind = {"gemm": "gemm", "moe": "grouped_gemm"}.get(family, "attention")
    peak = arithmetic_flops_per_s(device, table.dtype) * efficiency(device, kind, "value")
    memory = device.memory.bytes_per_s * efficiency(device, "memory", "value")
    return np.asarray(device.launch_s + np.maximum(flops / peak, num_bytes / memory))


def _transferred(tables: list[MeasuredTable], rng: np.random.Generator) -> list[Case]:
    """Every table of the second device that the first has too (same operator, format, back end and facts)."""
    start, end = TRANSFER
    clusters = [load_cluster(CLUSTERS[name]) for name in TRANSFER]
    by_key = {_key(table): table for table in tables if table.device == start}
    cases = []
    for table in tables:
        source = by_key.get(_key(table))
        if table.device != end or source is None or source.axes != table.axes:
            continue
        rows = _pick(np.arange(len(table.seconds_N)), rng)
        where = dict(zip(table.axes, table.points_ND[rows].T, strict=True))
        flops, num_bytes = work(table.op, table.dtype, where)
        peaks = [arithmetic_flops_per_s(cluster.device, table.dtype) for cluster in clusters]
        linked = FAMILIES[table.op] in ("collectives", "exchange")
        rates = [cluster.scale_up.bytes_per_s if linked else cluster.device.memory.bytes_per_s for cluster in clusters]
        found = source.seconds(where, (flops * peaks[0] / peaks[1], num_bytes * rates[0] / rates[1]))
        group = f"{end} from {start} {FAMILIES[table.op]}"
        baseline = _roofline(table, where, clusters[1])
        cases += _cases(f"{_title(table)}, from {start}", group, where, table.seconds_N[rows], found, baseline)
    return [case for group in dict.fromkeys(case.group for case in cases) for case in _with_interval(cases, group)]


def _with_interval(cases: list[Case], group: str) -> list[Case]:
    """A table knows nothing of another device: the interval is fitted to every other case, which no longer counts."""
    mine = [case for case in cases if case.group == group]
    errors = np.log([case.measured / case.predicted for case in mine[::2] if case.measured is not None])
    low, high = np.exp(np.quantile(errors, [0.05, 0.95]))
    return [
        replace(case, low=float(case.predicted * low), high=float(case.predicted * high), fitted=index % 2 == 0)
        for index, case in enumerate(mine)
    ]


def _key(table: MeasuredTable) -> tuple[str, ...]:
    facts = sorted((name, said) for name, said in table.facts.items() if name != "version")
    return (table.op, table.dtype, *(f"{name}={said}" for name, said in facts))
