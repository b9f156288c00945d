"""What the routing of an iteration's tokens costs: experts and exchanges, from counts. Compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

from moesim.costs.compute import _grouped_s
from moesim.serving.counted import count_step
from moesim.serving.groups import below, plane
from moesim.serving.prices import ADDED, GATHERED, NO_EXCHANGE


@njit(cache=True)
def _price_experts(prices, load_LP, scale, experts_s_LR):  # type: ignore[no-untyped-def]
    """Seconds of each rank's slots for `scale` times the load."""
    (num_layers, num_ranks), num_slots = experts_s_LR.shape, prices.slots_per_rank
    roofline = prices.roofline
    if not prices.has_experts_table:
        _grouped_s(
            load_LP.reshape(num_layers * num_ranks, num_slots),
            prices.params_LRS.reshape(num_layers * num_ranks, num_slots), roofline[0], roofline[1] * scale,
            roofline[2] * scale, roofline[3], experts_s_LR.reshape(num_layers * num_ranks),
        )  # fmt: skip
        for layer in range(num_layers):
            for rank in range(num_ranks):
                for p in range(rank * num_slots, (rank + 1) * num_slots):
                    if load_LP[layer, p]:
                        experts_s_LR[layer, rank] += roofline[4]
                        break
        return
    rows_I, active_J, experts_s_IJ = prices.rows_I, prices.active_J, prices.experts_s_IJ
    for layer in range(num_layers):
        for rank in range(num_ranks):
            rows, active = 0, 0
            for p in range(rank * num_slots, (rank + 1) * num_slots):
                rows += load_LP[layer, p]
                active += load_LP[layer, p] > 0
            if not rows:
                experts_s_LR[layer, rank] = 0.0
                continue
            i, j = below(rows_I, rows * scale), below(active_J, active)
            part_i = (rows * scale - rows_I[i]) / (rows_I[i + 1] - rows_I[i])
            part_j = (active - active_J[j]) / (active_J[j + 1] - active_J[j])
            experts_s_LR[layer, rank] = plane(experts_s_IJ, i, j, part_i, part_j)


@njit(cache=True)
def _price_gathered(prices, tokens_D, dispatch_s_LR, combine_s_LR):  # type: ignore[no-untyped-def]
    """Every rank gets the tokens of all others, each of which has its share of its group's.

    From its own node directly; from other nodes each of a node's ranks gets a share, which it hands to the others.
    """
    num_ranks, tp, node_R, exchange_s = dispatch_s_LR.shape[1], prices.tp, prices.node_R, prices.exchange_s
    total, node_first = 0.0, 0
    for group in range(tokens_D.size):
        total += max(tokens_D[group], 1)
    for rank in range(num_ranks):
        if node_R[rank] != node_R[node_first]:
            node_first = rank
        inside, local = 0.0, 0
        for other in range(node_first, num_ranks):
            if node_R[other] != node_R[rank]:
                break
            inside += max(tokens_D[other // tp], 1) / tp
            local += 1
        near, far = total - max(tokens_D[rank // tp], 1) / tp, (total - inside) / local
        dispatch_s_LR[:, rank] = max(near * exchange_s[0], far * exchange_s[1]) + exchange_s[4]
        combine_s_LR[:, rank] = max(near * exchange_s[2], far * exchange_s[3]) + exchange_s[4]


@njit(cache=True)
def _price_sent(traffic_CLR, exchange_s, scale, dispatch_s_LR, combine_s_LR):  # type: ignore[no-untyped-def]
    """By each rank's ports, see `moesim.costs.network.all_to_all_s`."""
    for layer in range(dispatch_s_LR.shape[0]):
        for rank in range(dispatch_s_LR.shape[1]):
            near = max(traffic_CLR[0, layer, rank], traffic_CLR[2, layer, rank]) * scale
            far = max(traffic_CLR[1, layer, rank], traffic_CLR[3, layer, rank]) * scale
            dispatch_s_LR[layer, rank] = max(near * exchange_s[0], far * exchange_s[1]) + exchange_s[4]
            combine_s_LR[layer, rank] = max(near * exchange_s[2], far * exchange_s[3]) + exchange_s[4]


@njit(cache=True)
def _add_load(prices, load_LP, scale, work):  # type: ignore[no-untyped-def]
    """Add the choices of each slot, and the busiest rank's over the mean."""
    num_layers, num_ranks, num_slots = load_LP.shape[0], prices.base_R.size, prices.slots_per_rank
    total_LP, width = work.load_LP, work.load_LP.shape[1]
    ratios, is_scaled = 0.0, scale != 1.0
    for layer in range(num_layers):
        total, most = 0, 0
        for rank in range(num_ranks):
            rows, first = 0, rank * num_slots
            there = first % width
            for s in range(num_slots):
                load = load_LP[layer, first + s]
                rows += load
                total_LP[layer, there + s] += np.int64(load * scale + 0.5) if is_scaled else load
            total += rows
            most = max(most, rows)
        ratios += most * num_ranks / max(total, 1)
    work.imbalance[0] += ratios / num_layers
    work.imbalance[1] += 1


@njit(cache=True)
def price_counted(prices, work, scratch):  # type: ignore[no-untyped-def]
    """Write the seconds of experts, dispatch and combine on each rank, from what was counted."""
    num_rows = work.num[1]
    scale = work.tokens_D.sum() / num_rows if num_rows else 0.0
    _price_experts(prices, scratch.load_LP, scale, scratch.experts_s_LR)
    if prices.exchange == GATHERED:
        _price_gathered(prices, work.tokens_D, scratch.dispatch_s_LR, scratch.combine_s_LR)
    elif prices.exchange != NO_EXCHANGE and prices.exchange != ADDED:
        exchange_s, dispatch_s_LR = prices.exchange_s, scratch.dispatch_s_LR
        _price_sent(scratch.traffic_CLR, exchange_s, scale, dispatch_s_LR, scratch.combine_s_LR)
    if num_rows:
        _add_load(prices, scratch.load_LP, scale, work)


@njit(cache=True)
def price_routed(prices, work, scratch):  # type: ignore[no-untyped-def]
    """Count the tokens, and price what they bring."""
    count_step(prices, work, scratch)
    price_counted(prices, work, scratch)
