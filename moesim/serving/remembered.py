"""Iterations whose routing is looked up by the number of tokens, for runs of days. Compiled."""

from __future__ import annotations

from numba import njit

from moesim.serving.groups import below
from moesim.serving.prices import ADDED, GATHERED, NO_EXCHANGE, NUM_OPS, SEND, SHARED
from moesim.serving.work import PARTS

_SHARED, _DISPATCH, _EXPERTS, _COMBINE, _HOST, _IDLE = (
    PARTS.index(part) for part in ("shared_experts", "dispatch", "experts", "combine", "host", "imbalance")
)
LOAD_EVERY = 16
"""Iterations of which one adds its load to the slots, for all of them."""


@njit(cache=True)
def _looked_up(tokens_G, s_GWSX, sample, stage, x, tokens):  # type: ignore[no-untyped-def]
    """Linear between token counts, and beyond the last."""
    g = below(tokens_G, tokens)
    part = (tokens - tokens_G[g]) / (tokens_G[g + 1] - tokens_G[g])
    low, high = s_GWSX[g, sample, stage, x], s_GWSX[g + 1, sample, stage, x]
    return max(low + part * (high - low), 0.0)


@njit(cache=True)
def _segments(memo, op_s_OD, segment_s_HD):  # type: ignore[no-untyped-def]
    """Seconds of each segment in each group."""
    num_ops, num_groups = op_s_OD.shape
    segment_HO = memo.segment_HO
    segment_s_HD[:] = 0.0
    for h in range(segment_HO.shape[0]):
        for op in range(num_ops):
            times = segment_HO[h, op]
            if times:
                for group in range(num_groups):
                    segment_s_HD[h, group] += times * op_s_OD[op, group]


@njit(cache=True)
def _slow_down(op_s_OD, slowdown_D, others):  # type: ignore[no-untyped-def]
    """All but collectives."""
    for op in range(op_s_OD.shape[0]):
        if op < others or (op > others + 1 and op != others + SEND):
            for group in range(slowdown_D.size):
                op_s_OD[op, group] *= slowdown_D[group]


@njit(cache=True)
def _own_experts(memo, tokens_D, sample, stage, clock_D):  # type: ignore[no-untyped-def]
    """Each group's experts for its own tokens, added to its clock; their mean."""
    total = 0.0
    for group in range(tokens_D.size):
        s = _looked_up(memo.tokens_G, memo.routed_s_GWSX, sample, stage, 1, max(tokens_D[group], 1))
        clock_D[group] += s
        total += s
    return total / tokens_D.size


@njit(cache=True)
def _spread_experts(prices, work, shared_s_D, sample, stage):  # type: ignore[no-untyped-def]
    """Seconds of a stage's dispatches, experts and combines; sent by the fullest rank, computed by all together."""
    memo, parts_P, tokens_D = prices.memo, work.parts_P, work.tokens_D
    total, most, shared_s = 0, 0, 0.0
    for group in range(tokens_D.size):
        total += tokens_D[group]
        most = max(most, tokens_D[group])
        shared_s = max(shared_s, shared_s_D[group])
    sent = total if prices.exchange == GATHERED else most * tokens_D.size
    tokens_G, routed_s_GWSX = memo.tokens_G, memo.routed_s_GWSX
    dispatch_s = _looked_up(tokens_G, routed_s_GWSX, sample, stage, 0, sent)
    experts_s = _looked_up(tokens_G, routed_s_GWSX, sample, stage, 1, total)
    combine_s = _looked_up(tokens_G, routed_s_GWSX, sample, stage, 2, sent)
    wait_s = _looked_up(tokens_G, routed_s_GWSX, sample, stage, 3, total)
    beside_s = 0.0
    if prices.has_shared and prices.exchange != ADDED:
        beside_s = max(memo.moe_S[stage] * shared_s - dispatch_s, 0.0)
    parts_P[_DISPATCH] += dispatch_s
    parts_P[_SHARED] += beside_s
    parts_P[_EXPERTS] += experts_s
    parts_P[_COMBINE] += combine_s
    return dispatch_s + beside_s + experts_s + combine_s + wait_s


@njit(cache=True)
def _remember_load(prices, work, sample):  # type: ignore[no-untyped-def]
    memo, load_LP = prices.memo, work.load_LP
    tokens = work.tokens_D.sum() * LOAD_EVERY
    for layer in range(load_LP.shape[0]):
        for p in range(load_LP.shape[1]):
            load_LP[layer, p] += int(memo.load_WLP[sample, layer, p] * tokens + 0.5)


@njit(cache=True)
def remembered_step(prices, work, scratch):  # type: ignore[no-untyped-def]
    """Seconds of an iteration whose groups are priced; parts are added, what ranks wait is what they leave."""
    memo, op_s_OD, parts_P, tokens_D = prices.memo, scratch.op_s_OD, work.parts_P, work.tokens_D
    num_ops, num_groups = op_s_OD.shape
    others = num_ops - 1 - NUM_OPS
    sample = scratch.turn[0] % memo.imbalance_GW.shape[1]
    if memo.slowdown_D.size:
        _slow_down(op_s_OD, memo.slowdown_D, others)
    segment_s_HD, clock_D = scratch.segment_s_HD, scratch.clock_R
    _segments(memo, op_s_OD, segment_s_HD)
    before_s = parts_P.sum() - parts_P[_IDLE]
    num_segments = segment_s_HD.shape[0]
    total_s = 0.0
    for stage in range(memo.moe_S.size):
        stage_s = 0.0
        clock_D[:] = 0.0
        for h in range(num_segments):
            times = memo.of_stage_SH[stage, h]
            if times:
                most_s = 0.0
                for group in range(num_groups):
                    most_s = max(most_s, segment_s_HD[h, group])
                    clock_D[group] += times * segment_s_HD[h, group]
                stage_s += times * most_s
        if prices.exchange == NO_EXCHANGE:
            parts_P[_EXPERTS] += _own_experts(memo, tokens_D, sample, stage, clock_D)
            stage_s = clock_D[:num_groups].max()
        else:
            stage_s += _spread_experts(prices, work, op_s_OD[others + SHARED], sample, stage)
        scratch.stage_s_S[stage] = stage_s
        total_s += stage_s
    for op in range(num_ops):
        times = 0.0
        for h in range(num_segments):
            for stage in range(memo.moe_S.size):
                times += memo.of_stage_SH[stage, h] * memo.segment_HO[h, op]
        if times:
            parts_P[memo.part_O[op]] += times * op_s_OD[op].sum() / num_groups
    parts_P[_HOST] += prices.host_s
    scratch.stage_s_S[memo.moe_S.size - 1] += prices.host_s
    total_s += prices.host_s
    parts_P[_IDLE] += total_s - (parts_P.sum() - parts_P[_IDLE] - before_s)
    g = below(memo.tokens_G, tokens_D.sum())
    work.imbalance[0] += memo.imbalance_GW[g, sample]
    work.imbalance[1] += 1
    scratch.turn[0] += 1
    if scratch.turn[0] // LOAD_EVERY > scratch.turn[1]:
        scratch.turn[1] = scratch.turn[0] // LOAD_EVERY
        _remember_load(prices, work, sample)
    return total_s
