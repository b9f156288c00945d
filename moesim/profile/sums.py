"""Whole passes as sums of their parts, looked up in measured tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.costs.measured import Interpolated, MeasuredTable
from moesim.profile.passes import Pass
from moesim.profile.shapes import AXES

Tables = Mapping[str, MeasuredTable]
"""Operator -> its table, for one model."""


class Part(NamedTuple):
    """Seconds of one operator in a pass, over all layers, and the ends of their 90 % interval."""

    seconds: float
    low: float
    high: float


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
