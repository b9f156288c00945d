"""Two slots on a rank: with the numbers of copies given, the heaviest copies with the lightest are the best pairs, so
that where the numbers are few, trying all of them is exact."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np

from moesim.optimize.balance import in_pairs
from moesim.optimize.problem import Floats, Ints, Problem

MOST_COUNTS = 20_000


def can_try_all(problem: Problem) -> bool:
    """Whether ranks hold pairs, and numbers of copies are few."""
    return problem.has_pairs and comb(problem.num_slots - 1, problem.num_experts - 1) <= MOST_COUNTS


def best_pairs(problem: Problem, load_LE: Floats) -> tuple[Ints, Floats]:
    """The placements with the least fullest ranks, [L, P], and how full these are over their speed, [L]."""
    cuts = np.array([*combinations(range(1, problem.num_slots), problem.num_experts - 1)], np.int64)
    count_XE = np.diff(cuts, axis=1, prepend=0, append=problem.num_slots)
    every = np.tile(np.arange(problem.num_experts), len(count_XE))
    expert_XP = np.repeat(every, count_XE.ravel()).reshape(len(count_XE), problem.num_slots)
    alone = 2 * problem.num_ranks - problem.num_slots
    slots, full = [], []
    for load_E in load_LE:
        copies_XP = -np.sort(-np.take_along_axis(load_E / count_XE, expert_XP, axis=1), axis=1)
        pairs_XP = copies_XP[:, alone:]
        full_X = np.maximum(copies_XP[:, 0], (pairs_XP + pairs_XP[:, ::-1]).max(axis=1, initial=0.0))
        best = int(full_X.argmin())
        slots.append(in_pairs(load_E, count_XE[best].copy(), problem.first_R, problem.speed_R, 0, 0))
        full.append(float(full_X[best] / problem.speed_R[0]))
    return np.array(slots, np.int32), np.array(full)
