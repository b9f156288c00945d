"""Whole passes as sums of their parts, looked up in measured tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.costs.measured import Interpolated, MeasuredTable
from moesim.profile.passes import Pass
from moesim.profile.rounds import Samples
from moesim.profile.shapes import AXES, Cell

Tables = Mapping[str, MeasuredTable]
"""Operator -> its table, for one model."""
MEDIAN_SPREAD = 1.2533
"""Standard deviation of a median of n normal values, over that of one divided by the root of n."""


class Part(NamedTuple):
    """Seconds of one operator in a pass, over all layers, and the ends of their 90 % interval."""

    seconds: float
    low: float
    high: float


def tables_of(
    cells: Sequence[Cell],
    samples: Samples,
    clock: str,
    model: str,
    dtype: str = "fp32",
    device: str = "cpu",
    provenance: Mapping[str, str] | None = None,
) -> dict[str, MeasuredTable]:
    """The timed cells of one model ("" for those of the machine) by operator, on `clock`, `cpu_s` or `wall_s`.

    Low and high are the 20th and 80th percentile of the *median* of the rounds, told from those of the rounds.
    """
    found = samples.percentiles(clock)
    tables = {}
    for op in dict.fromkeys(cell.op for cell in cells if cell.model == model and cell.key in found and cell.shape):
        mine = [cell for cell in cells if (cell.model, cell.op) == (model, op) and cell.key in found]
        p20, p50, p80 = np.array([found[cell.key] for cell in mine]).T
        rounds = np.array([len(samples.laps[cell.key]) for cell in mine])
        share = np.minimum(1.0, MEDIAN_SPREAD / np.sqrt(rounds))
        tables[op] = MeasuredTable(
            op,
            dtype,
            device,
            AXES[op],
            np.array([cell.shape for cell in mine], np.float64),
            p50,
            p50 * (p20 / p50) ** share,
            p50 * (p80 / p50) ** share,
            {"clock": clock.removesuffix("_s"), **({"model": model} if model else {})},
            provenance or {},
        )
    return tables


def moe_part(table: MeasuredTable, counts_LE: NDArray[np.int64]) -> Part:
    """All layers' MoE blocks, whose experts get `counts_LE` tokens.

    A layer takes the mean over its active experts of what the block takes where all of them get as many: experts run
    one after another, so their times add up, and what the block takes besides is in each of the terms once.

    Raises:
        ValueError: an expert gets more tokens than the table has.
    """
    layer, expert = np.nonzero(counts_LE)
    rows = counts_LE[layer, expert]
    active = np.bincount(layer, minlength=len(counts_LE))[layer]
    places = table.coordinates()
    fewest, most = places["active"].min(), places["active"].max()
    few = _inside(table.seconds({"active": fewest, "rows": rows}), rows)
    ends = few.seconds, few.low, few.high
    if most > fewest:
        # beyond the rows measured with all experts, the two stand to each other as at the last row
        last = np.minimum(rows, places["rows"][places["active"] == most].max())
        many, at_last = (table.seconds({"active": some, "rows": last}) for some in (most, fewest))
        grown = few.seconds / at_last.seconds
        share = (active - fewest) / (most - fewest)
        pairs = zip(ends, (many.seconds, many.low, many.high), strict=True)
        ends = tuple((1 - share) * one + share * other * grown for one, other in pairs)
    return Part(*(float(np.sum(end / active)) for end in ends))


def parts_of(tables: Tables, run: Pass, counts_LE: NDArray[np.int64]) -> dict[str, Part]:
    """What each operator takes in a pass, over all layers.

    Raises:
        ValueError: the pass needs a shape outside of the tables.
    """
    attention, frame = f"attention_{run.phase}", f"frame_{run.phase}"
    for op in ("moe_block", attention, frame):
        if op not in tables:
            raise ValueError(f"the profile has no {op}")
    length = run.context if run.phase == "decode" else run.tokens
    parts = {"moe_block": moe_part(tables["moe_block"], counts_LE)}
    for op, layers in ((attention, len(counts_LE)), (frame, 1)):
        at = dict(zip(AXES[op], (run.batch, length), strict=False))
        found = _inside(tables[op].seconds(at), at)
        parts[op] = Part(*(layers * float(end[0]) for end in (found.seconds, found.low, found.high)))
    return parts


def _inside(found: Interpolated, asked: object) -> Interpolated:
    if not found.inside.all():
        raise ValueError(f"{asked} is outside of what was measured")
    return found
