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

TOKEN_PARTS = ("attention", "allreduce", "router", "shared_experts", "dense", "allreduce_after")
"""What depends on a rank's tokens alone: projections; the collective of tensor parallelism after attention; ...; the
one after the experts or the dense network."""
NO_EXCHANGE, BY_RANK, BY_CHOICE, BY_NODE, GATHERED, ADDED = range(6)
"""How tokens reach spread experts: not at all; once to each rank that needs them; once for each choice; once to each
node; all to all ranks, and results back by reduce-scatter; or they are there already, and results are all-reduced."""


class Prices(NamedTuple):
    """Prices of one instance: D groups of tp ranks (R in all), L layers of V kinds, N points of a grid.

    Attributes:
        tp: ranks of a group.
        kind_L, moe_L, stage_L: of each layer in order its kind, its MoE layer in the trace (-1: none), and its
            pipeline stage.
        mixer_V, window_V: of each kind, which mixer (for `kept`), and the most tokens it looks back on.
        grid_N, token_s_VPN: tokens of a rank from 0 up, and seconds of each of `TOKEN_PARTS`.
        head_s_N: of rows through the output head; send_s_N: of tokens to the next stage.
        requests_A, context_C, decode_s_VAC: decoding requests, mean cached tokens of each, attention's seconds.
        chunk_X, before_Y, prefill_s_VXY: tokens of a chunk, tokens before it, attention's seconds.
        host_s: of an iteration, that nothing hides.
        slowdown_R: factor on the computation of each rank.
        place_LXE, base_R, slots_per_rank, node_R: see `moesim.routing.counting.Counter`.
        experts_mode: 0 for a roofline of each slot, 1 for a table by (rows, active slots) of a rank.
        params_LRS, roofline: parameters of each slot; [weight bytes, row bytes, s per FLOP, s per byte, launches' s].
        rows_I, active_J, experts_s_IJ: the table.
        exchange: one of `NO_EXCHANGE`, ...
        exchange_s: [dispatch: s per message inside a node, beyond; combine: inside, beyond; start of dispatch, of
            combine].
        shares_PX: of each of `moesim.serving.work.PARTS`, the share that rests on each of `SOURCES`.
    """

    tp: int
    kind_L: Ints
    moe_L: Ints
    stage_L: Ints
    mixer_V: Ints
    window_V: Floats
    grid_N: Floats
    token_s_VPN: Floats
    head_s_N: Floats
    send_s_N: Floats
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
    experts_mode: int
    params_LRS: Floats
    roofline: Floats
    rows_I: Floats
    active_J: Floats
    experts_s_IJ: Floats
    exchange: int
    exchange_s: Floats
    shares_PX: Floats
