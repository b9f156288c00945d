"""One iteration of an instance, priced and walked: the program of `moesim.program.forward`, compiled."""

from __future__ import annotations

from numba import njit

from moesim.serving.groups import price_groups
from moesim.serving.prices import (
    ADDED,
    ALLREDUCE,
    DRAFT_HEAD,
    HALF,
    JOINED,
    NO_EXCHANGE,
    NO_HEAD,
    NUM_OPS,
    ROUTER,
    SEND,
    SHARED,
)
from moesim.serving.remembered import remembered_step
from moesim.serving.routed import price_routed
from moesim.serving.work import PARTS

_ATTENTION, _ALLREDUCE, _ROUTER, _DENSE, _SHARED, _DISPATCH, _EXPERTS, _COMBINE, _HEAD, _SEND, _HOST, _IDLE = range(
    len(PARTS)
)


@njit(cache=True)
def price_step(prices, work, scratch):  # type: ignore[no-untyped-def]
    """Seconds of one iteration, 0 where no group has a token; exposed seconds are added to `work.parts_P`.

    Layer by layer, on each rank: attention and its all-reduce; a dense network, or router, dispatch with shared experts
    beside it, experts, combine. Dispatch and combine start together on all ranks. Ranks of a group with spread experts
    do their share of its tokens between the halves of its all-reduce, whatever the exchange; where results are added
    up (`ADDED`) every rank has all tokens, and one all-reduce follows.

    A group without tokens computes a dummy one, as vLLM's data-parallel ranks do, which is not routed.

    `work.rows_B` may hold fewer rows than there are tokens; they then stand for all, and counts are scaled.
    """
    scratch.stage_s_S[:] = 0.0
    if work.tokens_D.sum() == 0:
        return 0.0
    price_groups(prices, work, scratch.op_s_OD)
    if prices.memo.tokens_G.size:
        return remembered_step(prices, work, scratch)
    if prices.place_LXE.shape[0]:
        price_routed(prices, work, scratch)
    return _walk(prices, work.parts_P, scratch)


@njit(cache=True)
def _together(clock_R, first, last, parts_P):  # type: ignore[no-untyped-def]
    """Ranks wait for the last of them."""
    latest = 0.0
    for rank in range(first, last):
        latest = max(latest, clock_R[rank])
    for rank in range(first, last):
        parts_P[_IDLE] += (latest - clock_R[rank]) / clock_R.size
        clock_R[rank] = latest
    return latest


@njit(cache=True)
def _compute(clock_R, s_D, tp, slowdown_R, parts_P, part):  # type: ignore[no-untyped-def]
    """Every rank for itself."""
    total = 0.0
    for rank in range(clock_R.size):
        s = s_D[rank // tp] * slowdown_R[rank]
        clock_R[rank] += s
        total += s
    parts_P[part] += total / clock_R.size


@njit(cache=True)
def _reduce(clock_R, s_D, tp, parts_P):  # type: ignore[no-untyped-def]
    """A collective in each group."""
    total = 0.0
    for group in range(s_D.size):
        _together(clock_R, group * tp, (group + 1) * tp, parts_P)
        for rank in range(group * tp, (group + 1) * tp):
            clock_R[rank] += s_D[group]
        total += s_D[group]
    parts_P[_ALLREDUCE] += total / s_D.size


@njit(cache=True)
def _exchange(clock_R, s_LR, layer, parts_P, part):  # type: ignore[no-untyped-def]
    """A collective of all ranks; returns its start."""
    start = _together(clock_R, 0, clock_R.size, parts_P)
    total = 0.0
    for rank in range(clock_R.size):
        clock_R[rank] += s_LR[layer, rank]
        total += s_LR[layer, rank]
    parts_P[part] += total / clock_R.size
    return start


@njit(cache=True)
def _walk(prices, parts_P, scratch):  # type: ignore[no-untyped-def]
    """Clocks of all ranks through all layers; exposed seconds as `moesim.program.walk.account` charges them."""
    clock_R, op_s_OD, tp, slowdown_R = scratch.clock_R, scratch.op_s_OD, prices.tp, prices.slowdown_R
    num_mixers, num_layers, num_ranks = prices.window_V.size, prices.mixer_L.size, clock_R.size
    others = op_s_OD.shape[0] - 1 - NUM_OPS
    is_spread = prices.exchange != NO_EXCHANGE and prices.exchange != ADDED
    allreduce_s_D, half_s_D, send_s_D = op_s_OD[others + ALLREDUCE], op_s_OD[others + HALF], op_s_OD[others + SEND]
    router_s_D, shared_s_D, experts_s_LR = op_s_OD[others + ROUTER], op_s_OD[others + SHARED], scratch.experts_s_LR
    before_R, per_column = scratch.before_R, tp if prices.exchange == NO_EXCHANGE else 1
    clock_R[:] = 0.0
    stage_began = 0.0
    for layer in range(num_layers):
        mixer, dense, moe = prices.mixer_L[layer], prices.dense_L[layer], prices.moe_L[layer]
        head = prices.head_L[layer]
        if mixer >= 0:
            _compute(clock_R, op_s_OD[mixer], tp, slowdown_R, parts_P, _ATTENTION)
            if tp > 1:
                _reduce(clock_R, half_s_D if moe >= 0 and is_spread else allreduce_s_D, tp, parts_P)
        if dense >= 0:
            _compute(clock_R, op_s_OD[num_mixers + dense], tp, slowdown_R, parts_P, _DENSE)
            if tp > 1:
                _reduce(clock_R, allreduce_s_D, tp, parts_P)
        elif moe >= 0:
            _compute(clock_R, router_s_D, tp, slowdown_R, parts_P, _ROUTER)
            if is_spread:
                before_R[:] = clock_R
                _exchange(clock_R, scratch.dispatch_s_LR, moe, parts_P, _DISPATCH)
                if prices.has_shared:
                    for rank in range(num_ranks):
                        done = before_R[rank] + shared_s_D[rank // tp] * slowdown_R[rank]
                        if done > clock_R[rank]:
                            parts_P[_SHARED] += (done - clock_R[rank]) / num_ranks
                            clock_R[rank] = done
            elif prices.has_shared:
                _compute(clock_R, shared_s_D, tp, slowdown_R, parts_P, _SHARED)
            for rank in range(num_ranks):
                s = experts_s_LR[moe, rank // per_column] * slowdown_R[rank]
                clock_R[rank] += s
                parts_P[_EXPERTS] += s / num_ranks
            if is_spread:
                _exchange(clock_R, scratch.combine_s_LR, moe, parts_P, _COMBINE)
            if tp > 1:
                _reduce(clock_R, half_s_D if is_spread else allreduce_s_D, tp, parts_P)
        if head != NO_HEAD:
            row = others + JOINED if head == DRAFT_HEAD else others + NUM_OPS
            _compute(clock_R, op_s_OD[row], tp, slowdown_R, parts_P, _HEAD)
        if layer + 1 < num_layers and prices.stage_L[layer + 1] != prices.stage_L[layer]:
            _compute(clock_R, send_s_D, tp, scratch.ones_R, parts_P, _SEND)
            met = _together(clock_R, 0, num_ranks, parts_P)
            scratch.stage_s_S[prices.stage_L[layer]] = met - stage_began
            stage_began = met
    parts_P[_HOST] += prices.host_s
    end = _together(clock_R, 0, num_ranks, parts_P) + prices.host_s
    scratch.stage_s_S[prices.stage_L[num_layers - 1]] = end - stage_began
    return end
