"""Whole passes to run on a model: their sizes, off the table's grid, and which experts their tokens go to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from moesim.profile.shapes import Cell, ModelShape

ROUTINGS = ("natural", "hot", "zipf", "even")


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
            length = int(np.exp(rng.uniform(np.log(24), np.log(0.85 * tokens))) / 2 ** ceil(np.log2(requests)))
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
