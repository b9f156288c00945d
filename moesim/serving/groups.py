"""Seconds of what a group's tokens and contexts alone decide, from tables. Compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

from moesim.serving.prices import JOINED, NUM_OPS


@njit(cache=True)
def below(points_N, value):  # type: ignore[no-untyped-def]
    """Index of the cell of increasing points that the value is in, that at an end where it is beyond."""
    low, high = 0, points_N.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        if points_N[middle] <= value:
            low = middle
        else:
            high = middle
    return low


@njit(cache=True)
def _cell(grid_N, unit_points, value):  # type: ignore[no-untyped-def]
    """Cell of a whole number of tokens, and the part of it that is passed; the first points are one token apart."""
    if value < unit_points - 1:
        return np.int64(value), 0.0
    n = below(grid_N, value)
    return n, (value - grid_N[n]) / (grid_N[n + 1] - grid_N[n])


@njit(cache=True)
def _line(s_N, n, part):  # type: ignore[no-untyped-def]
    return s_N[n] + part * (s_N[n + 1] - s_N[n])


@njit(cache=True)
def _part(points_N, n, value):  # type: ignore[no-untyped-def]
    """How much of the cell is passed, beyond the last one more than all of it."""
    return max((value - points_N[n]) / (points_N[n + 1] - points_N[n]), 0.0)


@njit(cache=True)
def plane(s_AC, a, c, part_a, part_c):  # type: ignore[no-untyped-def]
    """Bilinear in one cell."""
    low = s_AC[a, c] + part_c * (s_AC[a, c + 1] - s_AC[a, c])
    high = s_AC[a + 1, c] + part_c * (s_AC[a + 1, c + 1] - s_AC[a + 1, c])
    return low + part_a * (high - low)


@njit(cache=True)
def _mixed_s(prices, mixer, beside, a, c, part_a, part_c):  # type: ignore[no-untyped-def]
    """What attention of decoding requests takes longer with so many tokens of prompts beside them."""
    x = below(prices.chunk_X, beside)
    part = min(_part(prices.chunk_X, x, beside), 1.0)
    low = plane(prices.mixed_s_VXAC[mixer, x], a, c, part_a, part_c)
    high = plane(prices.mixed_s_VXAC[mixer, x + 1], a, c, part_a, part_c)
    return low + part * (high - low)


@njit(cache=True)
def price_groups(prices, work, op_s_OD):  # type: ignore[no-untyped-def]
    """Write the seconds of each operation in each group.

    A group without tokens takes part with a dummy one: projections, networks and collectives, no scores and no head.
    """
    num_groups, num_mixers, num_ops = work.tokens_D.size, prices.window_V.size, prices.token_s_ON.shape[0]
    grid_N, token_s_ON, head_s_N, unit_points = prices.grid_N, prices.token_s_ON, prices.head_s_N, prices.unit_points
    requests_A, context_C, decode_s_VAC = prices.requests_A, prices.context_C, prices.decode_s_VAC
    drafting = num_ops - NUM_OPS + JOINED
    for group in range(num_groups):
        n, part = _cell(grid_N, unit_points, max(work.tokens_D[group], 1))
        for op in range(num_ops):
            op_s_OD[op, group] = _line(token_s_ON[op], n, part)
        decodes = work.decodes_D[group]
        n, part = _cell(grid_N, unit_points, work.heads_D[group])
        op_s_OD[num_ops, group] = _line(head_s_N, n, part)
        if prices.num_drafts:
            n, part = _cell(grid_N, unit_points, work.heads_D[group] - prices.num_drafts * decodes)
            op_s_OD[drafting, group] += _line(head_s_N, n, part)
        if decodes:
            a = below(requests_A, decodes)
            part_a = _part(requests_A, a, decodes)
            for mixer in range(num_mixers):
                context = work.kept_VD[mixer, group] / decodes
                c = below(context_C, context)
                part_c = _part(context_C, c, context)
                op_s_OD[mixer, group] += plane(decode_s_VAC[mixer], a, c, part_a, part_c)
                if prices.mixed_s_VXAC.shape[0] and work.tokens_D[group] > decodes * (1 + prices.num_drafts):
                    beside = work.tokens_D[group] - decodes * (1 + prices.num_drafts)
                    op_s_OD[mixer, group] += _mixed_s(prices, mixer, beside, a, c, part_a, part_c)
    chunk_X, before_Y, prefill_s_VXY = prices.chunk_X, prices.before_Y, prices.prefill_s_VXY
    for chunk in range(work.num[0]):
        tokens, before = work.chunk_tokens_C[chunk], work.chunk_context_C[chunk]
        x, y = below(chunk_X, tokens), below(before_Y, before)
        part_x, part_y = _part(chunk_X, x, tokens), _part(before_Y, y, before)
        for mixer in range(num_mixers):
            op_s_OD[mixer, work.chunk_group_C[chunk]] += plane(prefill_s_VXY[mixer], x, y, part_x, part_y)
