"""What compiled scheduling hands to compiled pricing, and gets back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PARTS = ("attention", "allreduce", "router", "dense", "shared_experts", "dispatch", "experts", "combine", "head",
         "send", "host", "imbalance")  # fmt: skip
"""Parts of an iteration; exposed seconds of each, mean over ranks, add up to it."""


class StepWork(NamedTuple):
    """The work of one iteration of an instance: arrays that are written over for each.

    D data-parallel groups, V kinds of mixers (in the order of `Prices`), C chunks of prompts, B tokens.

    Attributes:
        tokens_D: new tokens of each group: of prompts, and one (with drafts more) for each decoding request.
        heads_D: rows that go through the output head.
        decodes_D: decoding requests.
        kept_VD: cached tokens that they read, each request's no more than the mixer's window.
        num: [number of chunks, number of rows].
        chunk_tokens_C, chunk_context_C, chunk_group_C: of a chunk, the tokens before it, and its group.
        rows_B, group_B: row of the trace, and group, of each token whose routing is counted.
        parts_P: seconds are added to.
        load_LP: choices of each expert slot are added to, [L, slots of an expert-parallel group].
        imbalance: [sum of busiest rank's choices over the mean, mean over layers, over iterations; iterations].
    """

    tokens_D: Ints
    heads_D: Ints
    decodes_D: Ints
    kept_VD: Floats
    num: Ints
    chunk_tokens_C: Ints
    chunk_context_C: Ints
    chunk_group_C: Ints
    rows_B: Ints
    group_B: NDArray[np.int32]
    parts_P: Floats
    load_LP: Ints
    imbalance: Floats


def empty_work(
    num_groups: int, num_mixers: int, most_chunks: int, most_tokens: int, num_moe_layers: int, num_slots: int
) -> StepWork:
    """Room for iterations of up to so many chunks and tokens."""
    return StepWork(
        np.zeros(num_groups, np.int64), np.zeros(num_groups, np.int64), np.zeros(num_groups, np.int64),
        np.zeros((num_mixers, num_groups)), np.zeros(2, np.int64), np.zeros(most_chunks, np.int64),
        np.zeros(most_chunks, np.int64), np.zeros(most_chunks, np.int64), np.zeros(most_tokens, np.int64),
        np.zeros(most_tokens, np.int32), np.zeros(len(PARTS)), np.zeros((num_moe_layers, num_slots), np.int64),
        np.zeros(2),
    )  # fmt: skip
