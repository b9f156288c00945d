"""Whole passes of a real MoE model on the machine at hand, predicted from timings of its parts.

The parts and the passes are timed in the same shuffled rounds (`moesim.profile`). A pass is then predicted from the
table of parts alone: nothing is fitted to passes. What is taken from the pass itself is how many tokens each expert
got, which is moesim's input (a routing trace).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from moesim.profile.shapes import AXES, Cell, ModelShape, attention_work, work

ROUTINGS = ("natural", "hot", "zipf", "even")
Table = Mapping[str, Mapping[tuple[int, ...], float]]
"""Operator -> shape -> seconds of one part."""


@dataclass(frozen=True)
class Pass:
    """One run of the whole model.

    Attributes:
        batch, tokens, context: requests, new tokens of each, tokens of each in the cache.
        routing: one of `ROUTINGS`; `natural` is what the model's own routers choose.
    """

    batch: int
    tokens: int
    context: int
    routing: str

    @property
    def phase(self) -> str:
        """`decode` of one token a request, or `prefill`."""
        return "decode" if self.context else "prefill"

    @property
    def key(self) -> str:
        """The run in words."""
        size = f"{self.batch} at {self.context}" if self.context else f"{self.batch} x {self.tokens}"
        return f"{self.phase} {size} {self.routing}"


def draw_passes(
    cells: Sequence[Cell], num_prefill: int, num_decode: int, batch: int, context: int, tokens: int, seed: int
) -> list[Pass]:
    """Runs of random size, each routing in turn, inside the table's grid and off its points.

    Prompt lengths, context lengths, and batches above 8 are none of the grid's (the grid has every batch to 8).
    """
    rng = np.random.default_rng(seed)
    taken = {(cell.op, cell.shape[-1]) for cell in cells}
    found: dict[tuple[int, int, int], Pass] = {}
    while len(found) < num_prefill + num_decode:
        routing = ROUTINGS[len(found) % len(ROUTINGS)]
        if len(found) < num_prefill:
            requests = int(np.exp(rng.uniform(0, np.log(min(batch, 8) + 0.99))))
            length = int(np.exp(rng.uniform(np.log(24), np.log(0.85 * tokens))) / requests)
            run = Pass(requests, length, 0, routing)
            on_grid = length < 9 or ("attention_prefill", length) in taken
        else:
            requests = int(np.exp(rng.uniform(0, np.log(batch + 0.99))))
            length = int(rng.integers(ceil(context / 12), context))
            run = Pass(requests, 1, length, routing)
            on_grid = ("attention_decode", length) in taken or (requests > 8 and ("frame_decode", requests) in taken)
        if not on_grid:
            found.setdefault((run.batch, run.tokens, run.context), run)
    return list(found.values())


def forced_ids(shape: ModelShape, run: Pass, seed: int) -> NDArray[np.int64] | None:
    """[L, T, K] experts of every token, each expert at most once a token; None for natural routing.

    `hot`: a fifth of the experts are 30 times as likely as the others; `zipf`: likely as 1 / rank; both in another
    order in each layer. `even`: every expert in turn.
    """
    if run.routing == "natural":
        return None
    L, T, E, K = shape.layers, run.batch * run.tokens, shape.experts, shape.top_k
    rng = np.random.default_rng([seed, run.batch, run.tokens, run.context])
    if run.routing == "even":
        return (np.arange(T * K).reshape(1, T, K) + rng.integers(0, E, (L, 1, 1))) % E
    popularity = 1 / np.arange(1, E + 1) if run.routing == "zipf" else np.where(np.arange(E) < E / 5, 30.0, 1.0)
    scores = np.log(popularity) + rng.gumbel(size=(L, T, E))  # the top K of these are K draws without replacement
    order_LE = np.stack([rng.permutation(E) for _ in range(L)])
    top_LTK = np.argpartition(-scores, K - 1, axis=-1)[..., :K]
    return np.take_along_axis(order_LE[:, None, :].repeat(T, axis=1), top_LTK, axis=-1)


def counts_of(ids_LTK: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """[L, E] tokens of each expert."""
    return np.stack([np.bincount(ids.ravel(), minlength=num_experts) for ids in ids_LTK])


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


def roofline_s(
    shape: ModelShape, run: Pass, counts_LE: NDArray[np.int64], flops_per_s: float, bytes_per_s: float
) -> float:
    """Seconds by a plain roofline: each expert, each attention module and the head at the peaks of the machine."""

    def at_peak(flops: float, num_bytes: float) -> float:
        return max(flops / flops_per_s, num_bytes / bytes_per_s)

    experts = sum(at_peak(*work(shape, "moe", (1, int(rows)))) for rows in counts_LE[counts_LE > 0])
    attention = at_peak(*attention_work(shape, run.batch, run.tokens, run.context))
    size = (run.batch,) if run.phase == "decode" else (run.batch, run.tokens)
    return experts + shape.layers * attention + at_peak(*work(shape, f"frame_{run.phase}", size))
