"""What an iteration of an instance costs: tables by tokens and contexts, which compiled code reads.

All that a rank computes for its tokens alone is priced once for a grid of token counts, attention for grids of
requests and contexts; between the points seconds are linear. What the routing decides is counted token by token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ALLREDUCE, HALF, ROUTER, SHARED, SEND, JOINED, NUM_OPS = range(7)
"""What depends on a group's tokens alone, beside mixers and dense networks: an all-reduce of tensor parallelism; one
half of it (reduce-scatter or all-gather); router; shared experts; to the next stage; what joins hidden state and
embedding before a drafting layer. How many these are."""
NO_EXCHANGE, BY_RANK, BY_CHOICE, BY_NODE, GATHERED, ADDED = range(6)
"""How tokens reach spread experts: not at all; once to each rank that needs them; once for each choice; once to each
node; all to all ranks, and results back by reduce-scatter; or they are there already, and results are all-reduced."""
NO_HEAD, HEAD, DRAFT_HEAD = range(3)


class Prices(NamedTuple):
    """Prices of one instance: D groups of tp ranks (R in all), L layers, N points of a grid of token counts.

    V kinds of mixers, F kinds of dense networks; O = V + F + `NUM_OPS` operations that tokens alone decide, in this
    order. R expert ranks (groups, where experts are not spread) of S slots, P slots in an expert-parallel group.

    Attributes:
        tp: ranks of a group.
        mixer_L, dense_L, moe_L: of each layer in order its kind of mixer, its kind of dense network, and its MoE layer
            in the trace; -1 for none.
        head_L: which head follows the layer: `NO_HEAD`, `HEAD`, or `DRAFT_HEAD`.
        stage_L: its pipeline stage.
        window_V: the most tokens that a mixer looks back on.
        has_shared: whether experts are shared, beside the dispatch.
        num_drafts: tokens that are drafted for each decoding request.
        grid_N, token_s_ON: tokens of a group, the first `unit_points` from 0 on by one; seconds of each operation.
        head_s_N: of rows through the output head.
        requests_A, context_C, decode_s_VAC: decoding requests, mean cached tokens of each, attention's seconds.
        chunk_X, before_Y, prefill_s_VXY: tokens of a chunk, tokens before it, attention's seconds.
        host_s: of an iteration, that nothing hides.
        slowdown_R: factor on the computation of each rank.
        ids_TLK: of the trace.
        place_LXE, base_R, slots_per_rank, node_R: see `moesim.routing.counting.Counter`.
        has_experts_table: whether experts are priced by the table (rows, slots that have any) of a rank; else each slot
            is on its own roofline.
        params_LRS, roofline: parameters of each slot; [bytes of a weight, of a row, s per FLOP, s per byte, s of
            launches].
        rows_I, active_J, experts_s_IJ: the table.
        exchange: one of `NO_EXCHANGE`, ...
        exchange_s: [dispatch's s per message inside a node, beyond; combine's inside, beyond; starting one].
        shares_PX: of each of `moesim.serving.work.PARTS`, the share that rests on each of `hardware.SOURCES`.
        memo: what stands for counting, see `moesim.serving.memo`; without points where tokens are counted.
        mixed_s_VXAC: what attention takes beyond the sum of both where chunks of so many tokens together stand beside
            decoding requests; no V where nothing is known of it.
    """

    tp: int
    mixer_L: Ints
    dense_L: Ints
    moe_L: Ints
    head_L: Ints
    stage_L: Ints
    window_V: Floats
    has_shared: bool
    num_drafts: int
    unit_points: int
    grid_N: Floats
    token_s_ON: Floats
    head_s_N: Floats
    requests_A: Floats
    context_C: Floats
    decode_s_VAC: Floats
    chunk_X: Floats
    before_Y: Floats
    prefill_s_VXY: Floats
    host_s: float
    slowdown_R: Floats
    ids_TLK: NDArray[np.unsignedinteger]
    place_LXE: NDArray[np.uint64]
    base_R: NDArray[np.int32]
    slots_per_rank: int
    node_R: NDArray[np.int32]
    has_experts_table: bool
    params_LRS: Floats
    roofline: Floats
    rows_I: Floats
    active_J: Floats
    experts_s_IJ: Floats
    exchange: int
    exchange_s: Floats
    shares_PX: Floats
    memo: Memo
    mixed_s_VXAC: Floats = np.zeros((0, 2, 2, 2))


class Memo(NamedTuple):
    """What routing costs by the number of tokens, counted beforehand: G token counts, W samples of each, S stages.

    H kinds of segments: what ranks do between one combine and the next dispatch, or in a whole stage where there is
    neither.

    Attributes:
        tokens_G: of the instance; of a group where experts are not spread.
        routed_s_GWSX: seconds of all MoE layers of a stage: dispatch, experts, combine, means over ranks; and what
            ranks then wait for the slowest in them.
        imbalance_GW: busiest rank's choices over the mean, mean over layers.
        load_WLP: choices of each slot for one token.
        segment_HO, of_stage_SH: how many of each operation are in a segment, and of these in a stage. The last of O is
            the head.
        part_O: place of each operation in `moesim.serving.work.PARTS`.
        moe_S: MoE layers of each stage.
        slowdown_D: factor on the computation of the slowest rank of each group.
    """

    tokens_G: Floats
    routed_s_GWSX: Floats
    imbalance_GW: Floats
    load_WLP: Floats
    segment_HO: Floats
    of_stage_SH: Floats
    part_O: Ints
    moe_S: Ints
    slowdown_D: Floats


def no_memo() -> Memo:
    """Where every token is counted."""
    return Memo(
        np.zeros(0), np.zeros((0, 0, 0, 0)), np.zeros((0, 0)), np.zeros((0, 0, 0)), np.zeros((0, 0)), np.zeros((0, 0)),
        np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0),
    )  # fmt: skip
