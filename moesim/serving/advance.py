"""An instance runs: schedule, price, settle, one iteration after another, in compiled code."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from moesim.serving.blocks import cached_units
from moesim.serving.leap import count, leap, note_steps, note_tokens, widen
from moesim.serving.schedule import schedule_vllm
from moesim.serving.settle import settle
from moesim.serving.sglang import schedule_sglang
from moesim.serving.step import price_step


@njit(cache=True)
def _fill(b, batch):  # type: ignore[no-untyped-def]
    """What an iteration computes, as pricing wants it."""
    book, groups, rules, group_Q, work = b.book, b.groups, b.rules, b.group_Q, b.work
    work.tokens_D[:] = 0
    work.heads_D[:] = 0
    work.decodes_D[:] = 0
    work.kept_VD[:] = 0.0
    chunks, rows = 0, 0
    for n in range(groups.size_P[batch]):
        q, tokens = groups.batch_PN[batch, n], groups.take_PN[batch, n]
        d, start, prompt = group_Q[q], book.computed_Q[q], book.prompt_Q[q]
        total = prompt + book.generated_Q[q]
        work.tokens_D[d] += tokens
        if start == total - 1 and book.generated_Q[q] > 0:
            work.decodes_D[d] += 1
            work.heads_D[d] += tokens
            for v in range(rules.window_V.size):
                work.kept_VD[v, d] += min(float(total), rules.window_V[v])
        else:
            work.heads_D[d] += start + tokens == total
            work.chunk_tokens_C[chunks] = tokens
            work.chunk_context_C[chunks] = start
            work.chunk_group_C[chunks] = d
            chunks += 1
        if not rules.is_memoised:
            for place in range(start, start + tokens):
                if place < prompt:
                    row = book.prompt_row_Q[q] + (book.begin_prompt_Q[q] + place) % book.prompt_len_Q[q]
                else:
                    row = book.answer_row_Q[q] + (book.begin_answer_Q[q] + place - prompt) % book.answer_len_Q[q]
                work.rows_B[rows] = row
                work.group_B[rows] = d
                rows += 1
    work.num[0] = chunks
    work.num[1] = rows


@njit(cache=True)
def _schedule(b, batch, now_s):  # type: ignore[no-untyped-def]
    """Fill a batch; a group that only sent requests back tries again. Whether anything is in it."""
    groups, is_sglang = b.groups, b.rules.is_sglang
    groups.size_P[batch] = 0
    for d in range(groups.num_D.size):
        size, again = groups.size_P[batch], groups.num_D[d] > 0 or groups.waiting_D[d] > 0
        while again and groups.size_P[batch] == size:
            again = schedule_sglang(b, d, batch, now_s) if is_sglang else schedule_vllm(b, d, batch, now_s)
    return groups.size_P[batch] > 0


@njit(cache=True)
def note_held(timeline, running, waiting, kv_tokens, start_s, end_s):  # type: ignore[no-untyped-def]
    """Add so many running and waiting requests, and tokens held, from one time to another."""
    widen(timeline, end_s)
    at_s, width_s = start_s, timeline.width_s[0]
    while at_s < end_s:
        window = int(at_s / width_s)
        until_s = min(end_s, (window + 1) * width_s)
        if until_s <= at_s:  # rounding
            window, until_s = window + 1, min(end_s, (window + 2) * width_s)
        timeline.sums_WX[window, 0] += running * (until_s - at_s)
        timeline.sums_WX[window, 1] += waiting * (until_s - at_s)
        timeline.sums_WX[window, 2] += kv_tokens * (until_s - at_s)
        at_s = until_s


@njit(cache=True)
def _note(b, start_s, end_s):  # type: ignore[no-untyped-def]
    """Add what an instance holds, from one time to another, to the windows between them."""
    groups, rules = b.groups, b.rules
    running, waiting, used = 0.0, 0.0, 0.0
    for d in range(groups.num_D.size):
        running += groups.num_D[d]
        waiting += groups.waiting_D[d]
        used += rules.num_blocks - groups.free_D[d] - groups.idle_D[d] * rules.unit_blocks
    note_held(b.timeline, running, waiting, used * rules.block_size, start_s, end_s)


@njit(cache=True)
def _first_done(b):  # type: ignore[no-untyped-def]
    """The batch that is done first, -1 if none is on the way."""
    groups = b.groups
    found = -1
    for p in range(groups.size_P.size):
        if groups.finish_s_P[p] < math.inf and (found < 0 or groups.finish_s_P[p] < groups.finish_s_P[found]):
            found = p
    return found


@njit(cache=True)
def advance(b, now_s, until_s, most, stops):  # type: ignore[no-untyped-def]
    """Play an instance (its `Bundle`) up to a time: iterations before it begin, those over are settled.

    With pipeline stages, as many batches are on the way at once: one enters when the first stage is free, and a stage
    takes a batch when it has it from the one before and is done with its last one.

    Args:
        most: iterations, at most.
        stops: whether to come back as soon as a request has left.

    Returns:
        The time that was come to (where nothing is to be done and `until_s` is infinite, since when that is so); when
        something happens next, infinity if nothing does before something new comes; how many iterations began.
    """
    groups, first_most = b.groups, most
    while now_s < until_s and most > 0:
        free = np.int64(-1)  # a literal would compile all that it is given to twice
        for p in range(groups.size_P.size):
            if groups.finish_s_P[p] == math.inf:
                free = np.int64(p)
        first = _first_done(b)
        if free >= 0 and groups.stage_free_S[0] <= now_s and _schedule(b, free, now_s):
            most -= _start(b, free, now_s, most)
            if groups.size_P.size > 1:
                continue
            first = free
        next_s = math.inf
        if first >= 0:
            next_s = groups.finish_s_P[first]
            if free >= 0 and groups.stage_free_S[0] > now_s:
                next_s = min(next_s, groups.stage_free_S[0])
        if next_s > until_s or next_s == math.inf:
            if until_s < math.inf:
                _note(b, now_s, until_s)
                now_s = until_s
            return now_s, next_s, first_most - most
        _note(b, now_s, next_s)
        now_s = next_s
        if groups.finish_s_P[first] <= now_s:
            times, step_s = groups.times_P[first], groups.step_s_P[first]
            note_tokens(b.timeline, now_s, step_s, times, settle(b, first, now_s))
            groups.finish_s_P[first] = math.inf
            if stops and groups.done[0] > 0:
                break
    return now_s, now_s, first_most - most


@njit(cache=True)
def _start(b, batch, now_s, most):  # type: ignore[no-untyped-def]
    """Send a batch through the stages; as how many iterations (see `leap`)."""
    groups, work, scratch, timeline = b.groups, b.work, b.scratch, b.timeline
    _fill(b, batch)
    copy_s = 0.0
    for d in range(groups.copy_s_D.size):
        copy_s = max(copy_s, groups.copy_s_D[d])
        groups.copy_s_D[d] = 0.0
    times = leap(b, batch, most)
    scratch.parts_P[:] = work.parts_P
    scratch.imbalance[:] = work.imbalance
    price_step(b.prices, work, scratch)
    for part in range(work.parts_P.size):  # what is summed up counts the iteration once; keep how much that is
        scratch.parts_P[part] = work.parts_P[part] - scratch.parts_P[part]
    scratch.imbalance[0] = work.imbalance[0] - scratch.imbalance[0]
    scratch.imbalance[1] = work.imbalance[1] - scratch.imbalance[1]
    count(work, scratch, times - 1)
    groups.times_P[batch], groups.step_s_P[batch] = times, scratch.stage_s_S[0]
    at_s = now_s + copy_s
    for s in range(groups.stage_free_S.size):
        at_s = max(at_s, groups.stage_free_S[s]) + times * scratch.stage_s_S[s]
        groups.stage_free_S[s] = at_s
    groups.finish_s_P[batch] = at_s
    note_steps(scratch, timeline, now_s, scratch.stage_s_S[0], times, 1)
    return times


@njit(cache=True)
def tokens_at(b, waiting_D, held_D, work_D):  # type: ignore[no-untyped-def]
    """Of each group: prompt tokens to compute; tokens that its cache holds, computed ones that wait; all to compute."""
    book, groups, rules = b.book, b.groups, b.rules
    for d in range(groups.num_D.size):
        waiting_D[d], work_D[d] = 0, 0
        held_D[d] = (rules.num_blocks - groups.free_D[d] - groups.idle_D[d] * rules.unit_blocks) * rules.block_size
        q = groups.head_D[d]
        while q >= 0:
            waiting_D[d] += book.prompt_Q[q] - min(book.computed_Q[q], book.prompt_Q[q])
            held_D[d] += book.computed_Q[q]
            work_D[d] += book.output_Q[q] - book.generated_Q[q]
            q = book.next_Q[q]
        for i in range(groups.num_D[d]):
            q = groups.running_DM[d, i]
            waiting_D[d] += book.prompt_Q[q] - min(book.computed_Q[q], book.prompt_Q[q])
            work_D[d] += book.output_Q[q] - book.generated_Q[q]
        work_D[d] += waiting_D[d]


@njit(cache=True)
def prefix_tokens(b, q, found_D):  # type: ignore[no-untyped-def]
    """Tokens of a request's prompt that each group holds."""
    for d in range(found_D.size):
        found_D[d] = cached_units(b, d, q) * b.rules.unit_tokens
