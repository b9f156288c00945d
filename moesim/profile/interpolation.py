"""Seconds of shapes between the timed ones, and of whole passes as sums over layers and operators."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moesim.profile.passes import Pass
from moesim.profile.shapes import AXES

Table = Mapping[str, Mapping[tuple[int, ...], float]]
"""Operator -> shape -> seconds of one part."""


def interpolate(points: Mapping[tuple[int, ...], float], at: tuple[float, ...]) -> float:
    """Seconds at a shape, linear between neighbours along each axis in turn; the grid's rows may be of unequal length.

    Raises:
        ValueError: the shape is outside of the grid.

    >>> interpolate({(1, 1): 1.0, (1, 3): 3.0, (3, 1): 5.0, (3, 3): 7.0}, (2, 2))
    4.0
    """
    firsts = sorted({shape[0] for shape in points})
    above = int(np.searchsorted(firsts, at[0]))
    if above == len(firsts) or (firsts[above] > at[0] and above == 0):
        raise ValueError(f"{at[0]} is outside of the measured {firsts[0] if firsts else 'nothing'} to {firsts[-1:]}")
    ends = firsts[above : above + 1] if firsts[above] == at[0] else firsts[above - 1 : above + 1]
    values = []
    for end in ends:
        row = {shape[1:]: seconds for shape, seconds in points.items() if shape[0] == end}
        values.append(interpolate(row, at[1:]) if len(at) > 1 else row[()])
    if len(ends) == 1:
        return values[0]
    share = (at[0] - ends[0]) / (ends[1] - ends[0])
    return (1 - share) * values[0] + share * values[1]


def moe_s(points: Mapping[tuple[int, ...], float], counts_E: NDArray[np.int64]) -> float:
    """Seconds of one layer's MoE block whose experts get `counts_E` tokens.

    The mean over active experts of what the block takes where all of them get as many: experts run one after
    another, so their times add up, and what the block takes besides is in each of the terms once.
    """
    rows = counts_E[counts_E > 0]
    fewest, most = min(a for a, _ in points), max(a for a, _ in points)
    share = (len(rows) - fewest) / (most - fewest) if most > fewest else 0.0
    widest = max(rows_ for a, rows_ in points if a == most)
    few = {rows_: s for (a, rows_), s in points.items() if a == fewest}
    many = {rows_: s for (a, rows_), s in points.items() if a == most}
    few_s = _along(few, rows)
    # beyond the rows measured with all experts, the two stand to each other as at the last row
    many_s = _along(many, np.minimum(rows, widest)) * few_s / _along(few, np.minimum(rows, widest))
    return float(np.mean((1 - share) * few_s + share * many_s))


def _along(points: Mapping[int, float], at: NDArray[np.int64]) -> NDArray[np.float64]:
    places = sorted(points)
    if at.min() < places[0] or at.max() > places[-1]:
        raise ValueError(f"{at.min()} to {at.max()} rows are outside of the measured {places[0]} to {places[-1]}")
    return np.interp(at, places, [points[place] for place in places])


def parts_s(table: Table, run: Pass, counts_LE: NDArray[np.int64]) -> dict[str, float]:
    """Seconds that each operator takes in a pass, over all layers.

    Raises:
        ValueError: the pass needs a shape outside of the table.
    """
    size = (run.batch, run.context) if run.phase == "decode" else (run.batch, run.tokens)
    attention, frame = f"attention_{run.phase}", f"frame_{run.phase}"
    for op in ("moe", attention, frame):
        if not table.get(op):
            raise ValueError(f"the table has no {op}")
    return {
        "moe": sum(moe_s(table["moe"], counts_E) for counts_E in counts_LE),
        attention: len(counts_LE) * interpolate(table[attention], size),
        frame: interpolate(table[frame], size[: len(AXES[frame])]),
    }


def left_out_errors(points: Mapping[tuple[int, ...], float]) -> NDArray[np.float64]:
    """ln(told / timed) of each cell when it is told from its neighbours along the last axis.

    Cells that have both neighbours at a distance of 1 are left out: nothing lies between them.
    """
    errors = []
    for row in {shape[:-1] for shape in points}:
        places = sorted(shape[-1] for shape in points if shape[:-1] == row)
        for low, middle, high in zip(places, places[1:], places[2:], strict=False):
            if high - low > 2:
                share = (middle - low) / (high - low)
                told = (1 - share) * points[*row, low] + share * points[*row, high]
                errors.append(np.log(told / points[*row, middle]))
    return np.array(errors)
