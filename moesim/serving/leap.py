"""Iterations that are alike, played as one: those that only decode, until somebody leaves, or comes.

Their price is that of the one in the middle: contexts grow by one token each, in which it is linear but for the corners
of its tables. Where routing is replayed token by token no two are alike.
"""

from __future__ import annotations

from numba import njit

from moesim.serving.blocks import available, num_blocks, take
from moesim.serving.state import WINDOWS

LEAP = 32
"""Iterations at most."""


@njit(cache=True)
def leap(b, batch, most):  # type: ignore[no-untyped-def]
    """How many iterations the batch can stand for, at least 1 and at most `most`.

    Takes the blocks that they need, and moves the contexts that are priced to the middle.
    """
    book, groups, rules, group_Q, work = b.book, b.groups, b.rules, b.group_Q, b.work
    size, times = groups.size_P[batch], min(rules.leap, most)
    if times <= 1 or work.num[0] > 0 or size != groups.num_D.sum():
        return 1
    for d in range(groups.num_D.size):
        if groups.waiting_D[d] > 0 and groups.num_D[d] < rules.max_num_seqs:
            return 1
    for n in range(size):
        q = groups.batch_PN[batch, n]
        times = min(times, book.output_Q[q] - book.generated_Q[q])
    if times <= 1 or not _grow_all(b, batch, times):
        return 1
    for n in range(size):
        q = groups.batch_PN[batch, n]
        total, d = book.prompt_Q[q] + book.generated_Q[q], group_Q[q]
        for v in range(rules.window_V.size):
            middle = min(total + (times - 1) / 2, rules.window_V[v])
            work.kept_VD[v, d] += max(middle - total, 0.0)
    return times


@njit(cache=True)
def _grow_all(b, batch, times):  # type: ignore[no-untyped-def]
    """Take the blocks of so many further tokens of each request; False, and none taken, if there are too few."""
    book, groups, rules, group_Q = b.book, b.groups, b.rules, b.group_Q
    size = groups.size_P[batch]
    for d in range(groups.num_D.size):
        need = 0
        for i in range(groups.num_D[d]):
            q = groups.running_DM[d, i]
            need += max(num_blocks(book.computed_Q[q] + times, rules.block_size) - book.blocks_Q[q], 0)
        if need > available(b, d):
            return False
    for n in range(size):
        q = groups.batch_PN[batch, n]
        need = num_blocks(book.computed_Q[q] + times, rules.block_size) - book.blocks_Q[q]
        if need > 0:
            take(b, group_Q[q], need)
            book.blocks_Q[q] += need
    return True


@njit(cache=True)
def cut(b, now_s):  # type: ignore[no-untyped-def]
    """Somebody comes: of the iterations on their way, those that have not begun do not take place; how many."""
    groups, work, scratch, timeline = b.groups, b.work, b.scratch, b.timeline
    times, step_s = groups.times_P[0], groups.step_s_P[0]
    if groups.size_P[0] == 0 or times <= 1:
        return 0
    left = min(int((groups.finish_s_P[0] - now_s) / step_s), times - 1)
    groups.times_P[0] -= left
    groups.finish_s_P[0] -= left * step_s
    groups.stage_free_S[0] = groups.finish_s_P[0]
    count(work, scratch, -left)
    note_steps(scratch, timeline, groups.finish_s_P[0], step_s, left, -1)
    return left


@njit(cache=True)
def count(work, scratch, times):  # type: ignore[no-untyped-def]
    """Add the last iteration so many times more to all that is summed up."""
    scratch.turn[0] += times
    for part in range(work.parts_P.size):
        work.parts_P[part] += times * scratch.parts_P[part]
    work.imbalance[0] += times * scratch.imbalance[0]
    work.imbalance[1] += times * scratch.imbalance[1]


@njit(cache=True)
def note_steps(scratch, timeline, start_s, step_s, times, sign):  # type: ignore[no-untyped-def]
    """Add the last iteration so many times to what is sampled over time, or (sign -1) take it away again."""
    widen(timeline, start_s + times * step_s)
    for i in range(times):
        window = int((start_s + i * step_s) / timeline.width_s[0])
        timeline.sums_WX[window, 4] += sign * scratch.imbalance[0]
        timeline.sums_WX[window, 5] += sign * scratch.imbalance[1]
        timeline.sums_WX[window, 6] += sign * scratch.stage_s_S.sum() / scratch.stage_s_S.size


@njit(cache=True)
def note_tokens(timeline, end_s, step_s, times, tokens):  # type: ignore[no-untyped-def]
    """Add tokens that came out, as many at the end of each of the iterations."""
    for i in range(times):
        window = int((end_s - i * step_s) / timeline.width_s[0])
        timeline.sums_WX[window, 3] += tokens / times


@njit(cache=True)
def widen(timeline, until_s):  # type: ignore[no-untyped-def]
    """Make windows twice as long, until a time is in one."""
    while until_s >= timeline.width_s[0] * WINDOWS:
        for w in range(WINDOWS // 2):
            timeline.sums_WX[w] = timeline.sums_WX[2 * w] + timeline.sums_WX[2 * w + 1]
        timeline.sums_WX[WINDOWS // 2 :] = 0.0
        timeline.width_s[0] *= 2
