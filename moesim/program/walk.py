"""Walking a program with arrays: every operation starts as soon as what it waits for has finished.

No queue and no clock: the program's order is enough. This is all of `estimate`, and what `simulate` does with a
stretch in which nothing races.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.program.operation import Costs, Played, Program

Floats = NDArray[np.float64]


@njit(cache=True)
def _walk(group_NR, is_alone_N, after_start_N, after, seconds_NR, start_NR, finish_NR):  # type: ignore[no-untyped-def]
    """Starts and finishes, both 0 before; ranks that start alone, as most do, are taken together by vector units."""
    num_ops, num_ranks = seconds_NR.shape
    ready_G = np.empty(num_ranks)
    for n in range(num_ops):
        for i in range(after_start_N[n], after_start_N[n + 1]):
            before = after[i]
            for r in range(num_ranks):
                start, ready = start_NR[n, r], finish_NR[before, r]
                start_NR[n, r] = ready if ready > start else start
        if not is_alone_N[n]:
            ready_G[:] = 0.0
            for r in range(num_ranks):
                group = group_NR[n, r]
                if group >= 0:
                    ready_G[group] = max(ready_G[group], start_NR[n, r])
            for r in range(num_ranks):
                group = group_NR[n, r]
                start_NR[n, r] = ready_G[group] if group >= 0 else 0.0
                finish_NR[n, r] = start_NR[n, r] + seconds_NR[n, r] if group >= 0 else 0.0
            continue
        for r in range(num_ranks):
            finish_NR[n, r] = start_NR[n, r] + seconds_NR[n, r]


@njit(cache=True)
def _account(part_N, start_NR, finish_NR, end, exposed_XR, idle_R):  # type: ignore[no-untyped-def]
    num_ops, num_ranks = start_NR.shape
    frontier_R = np.zeros(num_ranks)
    for n in range(num_ops):
        part = part_N[n]
        for r in range(num_ranks):
            start, finish, frontier = start_NR[n, r], finish_NR[n, r], frontier_R[r]
            if finish > frontier:
                if start > frontier:
                    idle_R[r] += start - frontier
                    frontier = start
                exposed_XR[part, r] += finish - frontier
                frontier_R[r] = finish
    for r in range(num_ranks):
        idle_R[r] += end - frontier_R[r]


def walk(program: Program, costs: Costs) -> Played:
    """Play a program as if no two operations ever wanted the same shared resource."""
    start_NR, finish_NR = np.zeros_like(costs.seconds_NR), np.zeros_like(costs.seconds_NR)
    _walk(program.group_NR, program.is_alone_N, *program.waits, costs.seconds_NR, start_NR, finish_NR)
    return Played(program.operations, costs, start_NR, finish_NR, program.parts, program.part_N)


def account(played: Played) -> tuple[Floats, Floats]:
    """Where the time of each rank went.

    An operation is charged the time by which it moves the rank's frontier (the latest finish so far); what lies under
    another operation costs nothing. Gaps are waiting for others.

    Returns:
        exposed_XR float64 [X, R] for the X parts of the step, and idle_R [R]; their sum over X plus idle is the step.
    """
    num_ranks = played.start_NR.shape[1]
    exposed_XR, idle_R = np.zeros((len(played.parts), num_ranks)), np.zeros(num_ranks)
    _account(played.part_N, played.start_NR, played.finish_NR, played.seconds, exposed_XR, idle_R)
    return exposed_XR, idle_R
