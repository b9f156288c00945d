"""Iterations that are alike, played as one: those that only decode, until somebody comes or leaves.

Their price is that of the one in the middle: contexts grow by one token each, in which it is linear but for the corners
of its tables. Where routing is replayed token by token no two are alike.
"""

from __future__ import annotations

import math

from numba import njit

from moesim.serving.blocks import available, num_blocks, take

LEAP = 32
"""Iterations at most."""


@njit(cache=True)
def leap(book, groups, rules, group_Q, batch, work, about_s, left_s, most):  # type: ignore[no-untyped-def]
    """How many iterations the batch can stand for, of about so many seconds in the time that is left, at least 1.

    Takes the blocks that they need, and moves the contexts that are priced to the middle.
    """
    size, times = groups.size_P[batch], min(rules.leap, most)
    if times <= 1 or work.num[0] > 0 or size != groups.num_D.sum():
        return 1
    for d in range(groups.num_D.size):
        if groups.waiting_D[d] > 0 and groups.num_D[d] < rules.max_num_seqs:
            return 1
    if about_s > 0.0 and left_s < times * about_s:
        times = int(left_s / about_s)
    for n in range(size):
        q = groups.batch_PN[batch, n]
        times = min(times, book.output_Q[q] - book.generated_Q[q])
    if times <= 1 or not _grow_all(book, groups, rules, group_Q, batch, times):
        return 1
    for n in range(size):
        q = groups.batch_PN[batch, n]
        total, d = book.prompt_Q[q] + book.generated_Q[q], group_Q[q]
        for v in range(rules.window_V.size):
            middle = min(total + (times - 1) / 2, rules.window_V[v])
            work.kept_VD[v, d] += max(middle - total, 0.0)
    return times


@njit(cache=True)
def _grow_all(book, groups, rules, group_Q, batch, times):  # type: ignore[no-untyped-def]
    """Take the blocks of so many further tokens of each request; False, and none taken, if there are too few."""
    size = groups.size_P[batch]
    for d in range(groups.num_D.size):
        need = 0
        for i in range(groups.num_D[d]):
            q = groups.running_DM[d, i]
            need += max(num_blocks(book.computed_Q[q] + times, rules.block_size) - book.blocks_Q[q], 0)
        if need > available(groups, rules, d):
            return False
    for n in range(size):
        q = groups.batch_PN[batch, n]
        need = num_blocks(book.computed_Q[q] + times, rules.block_size) - book.blocks_Q[q]
        if need > 0:
            take(groups, rules, group_Q[q], need)
            book.blocks_Q[q] += need
    return True


@njit(cache=True)
def that_fit(times, step_s, left_s):  # type: ignore[no-untyped-def]
    """As many of the iterations as are over in the time that is left, now that their price is known; at least 1."""
    if times > 1 and times * step_s > left_s:
        times = max(int(math.floor(left_s / step_s)), 1)
        if times > 1 and times * step_s > left_s:
            times -= 1
    return times
