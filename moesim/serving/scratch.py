"""Room in which compiled pricing works, kept between iterations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.serving.prices import BY_CHOICE, BY_NODE, BY_RANK, NO_EXCHANGE, Prices
from moesim.serving.work import PARTS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Scratch(NamedTuple):
    """Arrays that each iteration writes over; shapes as in `Prices`, B tokens at most.

    stage_s_S: seconds of the last iteration in each pipeline stage; they add up to it.
    op_s_OD: seconds of each operation in each group, attention with its scores, and last of O the head.
    turn: [iterations priced, and how often their load was added to the slots].
    parts_P, imbalance: what the last iteration added to those of `StepWork`.
    """

    stage_s_S: Floats
    op_s_OD: Floats
    clock_R: Floats
    before_R: Floats
    ones_R: Floats
    source_B: NDArray[np.int32]
    choice_B: Ints
    order_B: Ints
    first_R: Ints
    load_LP: NDArray[np.int32]
    sent_LRR: NDArray[np.int32]
    sent_LRN: NDArray[np.int32]
    stamp_LR: NDArray[np.int32]
    traffic_CLR: NDArray[np.int32]
    experts_s_LR: Floats
    dispatch_s_LR: Floats
    combine_s_LR: Floats
    segment_s_HD: Floats
    turn: Ints
    parts_P: Floats
    imbalance: Floats


def empty_scratch(prices: Prices, num_groups: int, most_tokens: int) -> Scratch:
    """Room for iterations of up to so many tokens."""
    num_moe, num_expert_ranks, num_ranks = len(prices.place_LXE), len(prices.base_R), num_groups * prices.tp
    sends = prices.exchange in (BY_RANK, BY_CHOICE, BY_NODE)
    num_sent = num_expert_ranks if sends else 0
    num_nodes = int(prices.node_R.max(initial=0)) + 1 if prices.exchange == BY_NODE else 0
    shape = (num_moe, num_expert_ranks)
    assert prices.exchange == NO_EXCHANGE or num_ranks == num_expert_ranks
    return Scratch(
        stage_s_S=np.zeros(int(prices.stage_L.max()) + 1),
        op_s_OD=np.zeros((len(prices.token_s_ON) + 1, num_groups)),
        clock_R=np.zeros(num_ranks), before_R=np.zeros(num_ranks), ones_R=np.ones(num_ranks),
        source_B=np.zeros(most_tokens, np.int32), choice_B=np.arange(most_tokens),
        order_B=np.zeros(most_tokens, np.int64), first_R=np.zeros(num_expert_ranks + 1, np.int64),
        load_LP=np.zeros((num_moe, num_expert_ranks * prices.slots_per_rank), np.int32),
        sent_LRR=np.zeros((num_moe, num_sent, num_sent), np.int32),
        sent_LRN=np.zeros((num_moe, num_sent, num_nodes), np.int32),
        stamp_LR=np.zeros(shape, np.int32), traffic_CLR=np.zeros((4, *shape), np.int32),
        experts_s_LR=np.zeros(shape), dispatch_s_LR=np.zeros(shape), combine_s_LR=np.zeros(shape),
        segment_s_HD=np.zeros((len(prices.memo.segment_HO), num_groups)), turn=np.zeros(2, np.int64),
        parts_P=np.zeros(len(PARTS)), imbalance=np.zeros(2),
    )  # fmt: skip
