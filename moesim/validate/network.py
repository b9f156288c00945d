"""Collectives by start, rate and filling of a pipeline: fitted on every second size, judged on the others.

And DeepEP's published times, from which those of other numbers of ranks follow.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.calibrate.serving import SYSTEMS
from moesim.calibrate.transfers import fit_transfer
from moesim.costs.measured import MeasuredTable
from moesim.costs.work import work
from moesim.files.hardware import load_cluster
from moesim.files.profiles.aiconfigurator import import_aiconfigurator
from moesim.validate.cases import Case, Validation

Floats = NDArray[np.float64]

TABLES = ("nccl_perf", "custom_allreduce_perf", "wideep_deepep_ll_perf", "wideep_deepep_normal_perf")
SIZES = ("message_bytes", "num_tokens")
"""Axes that are the size of a message; a transfer is fitted for each value of the others."""
FEWEST = 6
"""Sizes that a curve must have: three to fit, three to judge."""
AIMS = {"median_abs_error": (0.0, 0.08)}
"""Of every group."""
PREDICTED_EP = (16, 64, 256)
DEEPEP_MACHINE = "hgx-h800"
FP8_ROW = 1 + 4 / 128
"""Bytes per value of a dispatched row: one, and a scale of four for each 128."""


def validate_network(
    directory: Path,
    devices: tuple[str, ...] = (),
    published: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Validation:
    """Predict every second size of the collectives under `directory` from the others.

    Args:
        directory: aiconfigurator's tables, see `import_aiconfigurator`.
        devices: systems; all if none are named.
        published: DeepEP's published times, a CSV with ep, tokens_per_rank, hidden, topk, dispatch_us, combine_us.
        report: told what is done.

    Raises:
        ValueError: no tables, or a file that cannot be read.
    """
    cases: list[Case] = []
    for tables in import_aiconfigurator(directory, devices, TABLES).tables.values():
        for table in tables:
            cases += _held_out(table)
        if tables:
            report(f"{tables[0].device}: {', '.join(dict.fromkeys(table.op for table in tables))}")
    facts: dict[str, Any] = {"split": "fitted on every second size, judged on the others"}
    if published is not None:
        rows, said = _published(published)
        cases += rows
        facts |= said
    return Validation("network", tuple(sorted(cases, key=lambda case: case.group)), facts, AIMS)


def _held_out(table: MeasuredTable) -> Iterator[Case]:
    """Every second size of each curve of a table."""
    axis = next(name for name in SIZES if name in table.axes)
    place = table.axes.index(axis)
    others = np.delete(table.points_ND, place, axis=1)
    kernel = " ".join(table.facts[name] for name in ("kernel", "mode", "implementation") if name in table.facts)
    version = f"{table.facts['backend']} {table.facts['version']}"
    num_bytes_N = work(table.op, table.dtype, table.coordinates())[1]
    for values in np.unique(others, axis=0):
        mine = np.flatnonzero((others == values).all(axis=1))
        mine = mine[np.argsort(table.points_ND[mine, place])]
        if len(mine) < FEWEST:
            continue
        known, asked = mine[::2], mine[1::2]
        fit = fit_transfer(num_bytes_N[known], table.seconds_N[known])
        ratio = np.abs(np.log(fit.seconds(num_bytes_N[known]) / table.seconds_N[known]))
        half = float(np.quantile(ratio, 0.9)) * np.sqrt(len(known) / max(1, len(known) - 4))
        where = " ".join(f"{name}={value:.0f}" for name, value in zip(
            (name for name in table.axes if name != axis), values, strict=True))  # fmt: skip
        for row, seconds in zip(asked, fit.seconds(num_bytes_N[asked]), strict=True):
            size = f"{axis}={table.points_ND[row, place]:.0f} {version}"
            low, high = (float(seconds * np.exp(sign * half)) for sign in (-1, 1))
            yield Case(
                f"{table.device} {table.op} {table.dtype} {kernel}: {where} {size}", float(table.seconds_N[row]),
                float(seconds), low, high, False, f"{table.device} {_family(table)}", _plain_s(table, num_bytes_N[row]),
            )  # fmt: skip


def _family(table: MeasuredTable) -> str:
    if table.facts.get("kernel") == "deepep":
        return f"DeepEP {'low latency' if table.facts['mode'] == 'll' else 'normal'} {table.op}"
    return f"{'NCCL' if table.facts['backend'] == 'nccl' else 'custom'} {table.op}"


def _plain_s(table: MeasuredTable, num_bytes: float) -> float | None:
    """Latency and datasheet bandwidth of the link inside a node."""
    if table.device not in SYSTEMS or table.coordinates().get("node_num", np.ones(1)).max() > 1:
        return None
    link = load_cluster(SYSTEMS[table.device]).scale_up
    return link.latency_s + num_bytes / link.bytes_per_s


def _published(path: Path) -> tuple[list[Case], dict[str, str]]:
    """DeepEP's low-latency kernels on H800: what the published numbers of ranks say of others.

    Bytes for ranks of the own node and bytes for others have a rate each; whether both move at once is not said, so it
    is fitted either way: the way that explains the rows better predicts, and both are in the interval.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases, facts = [], {}
    for op, row_bytes in (("dispatch", FP8_ROW), ("combine", 2.0)):
        try:
            ep, seconds = (np.array([float(row[name]) for row in rows]) for name in ("ep", f"{op}_us"))
            each = [[float(row[name]) for name in ("tokens_per_rank", "topk", "hidden")] for row in rows]
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: needs numbers under ep, tokens_per_rank, hidden, topk and {op}_us ({error})"
            ) from error
        seconds, sent = seconds * 1e-6, np.prod(each, axis=1) * row_bytes
        ways = [_two_rates(ep, sent, seconds, at_once, path) for at_once in (True, False)]
        best = min(ways, key=lambda way: way.half)
        for size, taken, amount in zip(ep, seconds, sent, strict=True):
            ends = [way.seconds(size, amount) * np.exp(sign * way.half) for way in ways for sign in (-1, 1)]
            said = f"DeepEP published {op} EP{size:.0f}"
            found = best.seconds(size, amount)
            cases.append(Case(said, float(taken), found, min(ends), max(ends), True, "DeepEP published, fitted"))
        told = []
        for size in PREDICTED_EP:
            ends = [1e6 * way.seconds(size, sent[-1]) * np.exp(sign * way.half) for way in ways for sign in (-1, 1)]
            told.append(f"EP{size} {1e6 * best.seconds(size, sent[-1]):.0f} us ({min(ends):.0f} to {max(ends):.0f})")
        facts[f"DeepEP low latency {op}, predicted"] = ", ".join(told)
        facts[f"DeepEP low latency {op}, fitted"] = (
            f"{best.near / 1e9:.0f} GB/s inside a node and {best.far / 1e9:.1f} beyond, "
            f"{'at once' if best.at_once else 'one after the other'}; rows within {best.half:.1%}"
        )
    return cases, facts


class _TwoRates(NamedTuple):
    """Bytes per second inside a node and beyond, whether both move at once, and the largest log error of the rows."""

    near: float
    far: float
    at_once: bool
    half: float
    per_node: int

    def seconds(self, ep: float, sent: float) -> float:
        """Of `ep` ranks that send so many bytes each, evenly."""
        away = max(0.0, 1 - self.per_node / ep)
        near_s, far_s = sent * (1 - away - 1 / ep) / self.near, sent * away / self.far
        return float(max(near_s, far_s) if self.at_once else near_s + far_s)


def _two_rates(ep: Floats, sent: Floats, seconds: Floats, at_once: bool, path: Path) -> _TwoRates:
    """The near rate is that of rows inside a node, the far rate is fitted to the others."""
    per_node = load_cluster(DEEPEP_MACHINE).devices_per_node
    inside, beyond = ep <= per_node, ep > per_node
    if not inside.any() or beyond.sum() < 2:
        raise ValueError(f"{path}: needs a row inside one node and two beyond it, to tell both rates")
    near = float(np.exp(np.mean(np.log((sent * (1 - 1 / ep) / seconds)[inside]))))
    near_s = 0.0 if at_once else (sent * (per_node - 1) / ep)[beyond] / near
    far = float(np.exp(np.mean(np.log(sent[beyond] * (1 - per_node / ep[beyond]) / (seconds[beyond] - near_s)))))
    found = _TwoRates(near, far, at_once, 0.0, per_node)
    errors = [np.log(found.seconds(*given) / taken) for *given, taken in zip(ep, sent, seconds, strict=True)]
    return found._replace(half=float(np.abs(errors).max()))
