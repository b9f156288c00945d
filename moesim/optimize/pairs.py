"""Two slots on a rank: with the numbers of copies given, the heaviest copies with the lightest are the best pairs, so
that where the numbers are few, trying all of them is exact."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from moesim.optimize.problem import Floats, Ints, Problem

MOST_COUNTS = 20_000


def can_try_all(problem: Problem) -> bool:
    """Whether ranks are as fast, have one slot or two, and numbers of copies are few."""
    is_pair = problem.slots_R.max() == 2 and problem.slots_R.min() >= 1 and np.ptp(problem.speed_R) == 0
    return bool(is_pair) and comb(problem.num_slots - 1, problem.num_experts - 1) <= MOST_COUNTS


def best_pairs(problem: Problem, load_LE: Floats) -> tuple[Ints, Floats]:
    """The placements with the least fullest ranks, [L, P], and how full these are over their speed, [L]."""
    cuts = np.array([*combinations(range(1, problem.num_slots), problem.num_experts - 1)], np.int64)
    count_XE = np.diff(cuts, axis=1, prepend=0, append=problem.num_slots)
    every = np.tile(np.arange(problem.num_experts), len(count_XE))
    expert_XP = np.repeat(every, count_XE.ravel()).reshape(len(count_XE), problem.num_slots)
    alone = 2 * problem.num_ranks - problem.num_slots
    at_P: NDArray[np.int64] = np.empty(problem.num_slots, np.int64)  # where the heaviest, the next, ... copies go
    single, double = np.flatnonzero(problem.slots_R == 1), np.flatnonzero(problem.slots_R == 2)
    at_P[:alone] = problem.first_R[single]
    at_P[alone : alone + len(double)] = problem.first_R[double]
    at_P[alone + len(double) :] = problem.first_R[double][::-1] + 1
    slots, full = [], []
    for load_E in load_LE / float(problem.speed_R[0]):
        copies_XP = np.take_along_axis(load_E / count_XE, expert_XP, axis=1)
        order_XP = np.argsort(-copies_XP, axis=1, kind="stable")
        copies_XP = np.take_along_axis(copies_XP, order_XP, axis=1)
        pairs_XP = copies_XP[:, alone:]
        full_X = np.maximum(copies_XP[:, 0], (pairs_XP + pairs_XP[:, ::-1]).max(axis=1, initial=0.0))
        best = int(full_X.argmin())
        slot_P = np.empty(problem.num_slots, np.int32)
        slot_P[at_P] = expert_XP[best, order_XP[best]]
        slots.append(slot_P)
        full.append(float(full_X[best]))
    return np.array(slots, np.int32), np.array(full)
