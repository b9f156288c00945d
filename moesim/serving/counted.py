"""Counting the routing of an iteration's tokens, as `moesim.routing.counting.Counter` does. Compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

from moesim.routing.counting import _RANK_SHIFT, _count, _count_nodes, _sum_relayed, _sum_traffic
from moesim.serving.prices import ADDED, BY_CHOICE, BY_NODE, GATHERED, NO_EXCHANGE

_FEW = 8
"""Ranks whose messages fit the bytes of one number."""


@njit(cache=True)
def _deal(group_B, ranks_per_group, source_B, order_B, first_R):  # type: ignore[no-untyped-def]
    """Expert rank of each token, tokens of a group in turn over its ranks; and tokens in the order of their ranks."""
    first_R[:] = 0
    for i in range(group_B.size):
        source = group_B[i] * ranks_per_group + i % ranks_per_group
        source_B[i] = source
        first_R[source + 1] += 1
    for rank in range(1, first_R.size):
        first_R[rank] += first_R[rank - 1]
    for i in range(group_B.size):
        order_B[first_R[source_B[i]]] = i
        first_R[source_B[i]] += 1


@njit(cache=True)
def _count_loads(ids_TLK, rows_B, base_B, place_LXE, load_LP):  # type: ignore[no-untyped-def]
    """Choices of each slot, where nobody asks who sent them."""
    num_layers, top_k, num_choices = ids_TLK.shape[1], ids_TLK.shape[2], place_LXE.shape[1]
    slot_bits = (np.uint64(1) << np.uint64(_RANK_SHIFT)) - np.uint64(1)
    for i in range(rows_B.size):
        row, choice, base = rows_B[i], i % num_choices, np.uint64(base_B[i])
        for layer in range(num_layers):
            for k in range(top_k):
                load_LP[layer, base + (place_LXE[layer, choice, ids_TLK[row, layer, k]] & slot_bits)] += 1


@njit(cache=True)
def _count_few(ids_TLK, rows_B, source_B, order_B, place_LXE, load_LP, sent_LRR, every):  # type: ignore[no-untyped-def]
    """As `counting._count`, for one group of up to `_FEW` ranks: a byte for each rank holds the messages of a source.

    Adding to one of few places again and again would wait for the last addition each time; a register does not.
    """
    num_layers, top_k, num_choices = ids_TLK.shape[1], ids_TLK.shape[2], place_LXE.shape[1]
    num_ranks, shift, one = sent_LRR.shape[1], np.uint64(_RANK_SHIFT), np.uint64(1)
    slot_bits = (one << shift) - one
    most = 255 // top_k if every else 255
    for layer in range(num_layers):
        first = 0
        while first < rows_B.size:
            source, last = source_B[order_B[first]], min(first + most, rows_B.size)
            sent, i = np.uint64(0), first
            while i < last and source_B[order_B[i]] == source:
                token, of_token = order_B[i], np.uint64(0)
                row, choice = rows_B[token], token % num_choices
                for k in range(top_k):
                    place = place_LXE[layer, choice, ids_TLK[row, layer, k]]
                    load_LP[layer, place & slot_bits] += 1
                    byte = one << ((place >> shift) << np.uint64(3))
                    of_token = of_token + byte if every else of_token | byte
                sent += of_token
                i += 1
            for rank in range(num_ranks):
                sent_LRR[layer, source, rank] += np.int32((sent >> np.uint64(8 * rank)) & np.uint64(255))
            first = i


@njit(cache=True)
def count_step(prices, work, scratch):  # type: ignore[no-untyped-def]
    """Write loads, and where tokens are sent their messages."""
    rows_B, num = work.rows_B[: work.num[1]], work.num[1]
    source_B, order_B, choice_B = scratch.source_B[:num], scratch.order_B[:num], scratch.choice_B[:num]
    load_LP, place_LXE, base_R = scratch.load_LP, prices.place_LXE, prices.base_R
    load_LP[:] = 0
    if prices.exchange == NO_EXCHANGE or prices.exchange == ADDED or prices.exchange == GATHERED:
        slots = prices.slots_per_rank if prices.exchange == NO_EXCHANGE else 0
        for i in range(num):
            source_B[i] = work.group_B[i] * slots
        _count_loads(prices.ids_TLK, rows_B, source_B, place_LXE, load_LP)
        return
    _deal(work.group_B[:num], prices.tp, source_B, order_B, scratch.first_R)
    scratch.sent_LRR[:] = 0
    scratch.stamp_LR[:] = -1
    scratch.traffic_CLR[:] = 0
    by_choice = prices.exchange == BY_CHOICE
    if base_R.size <= _FEW and prices.ids_TLK.shape[2] <= 255:
        _count_few(prices.ids_TLK, rows_B, source_B, order_B, place_LXE, load_LP, scratch.sent_LRR, by_choice)
    else:
        _count(
            prices.ids_TLK, rows_B, source_B, choice_B, order_B, base_R, place_LXE, prices.slots_per_rank, load_LP,
            scratch.sent_LRR, scratch.stamp_LR, np.int32(by_choice),
        )  # fmt: skip
    if prices.exchange == BY_NODE:
        scratch.sent_LRN[:] = 0
        _count_nodes(prices.ids_TLK, rows_B, source_B, choice_B, base_R, place_LXE, prices.node_R, scratch.sent_LRN)
        _sum_relayed(scratch.sent_LRR, scratch.sent_LRN, prices.node_R, scratch.traffic_CLR)
    else:
        _sum_traffic(scratch.sent_LRR, prices.node_R, scratch.traffic_CLR)
