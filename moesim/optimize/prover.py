"""CP-SAT as a prover of balance: the least fullest rank of small layers, exactly or as far as time allows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from moesim.optimize.clock import Clock
from moesim.optimize.problem import Floats, Ints, Problem
from moesim.optimize.score import fullest_L

MOST_BOOLEANS = 600
"""Larger layers are not worth a try: CP-SAT does not get above the bounds that cost nothing."""
UNITS = 1_000_000


def proved_load_L(
    problem: Problem, load_LE: Floats, least_L: Floats, slot_LP: Ints, clock: Clock, close: float = 1e-3
) -> Floats:
    """What no placement has a fullest rank below, [L]: better than the known `least_L` where these are not `close`.

    Args:
        slot_LP: the answer, as a hint; the bound does not rest on it.
        clock: layers share the time that is left.
    """
    found_L = np.array(least_L)
    full_L = fullest_L(problem, slot_LP, load_LE)
    most = problem.num_slots - problem.num_experts + 1
    if problem.num_experts * problem.num_ranks * most > MOST_BOOLEANS:
        return found_L
    todo = np.flatnonzero(full_L > found_L * (1 + close)).tolist()
    for number, layer in enumerate(todo):
        if clock.is_over:
            break
        limit_s = min(clock.left_s / (len(todo) - number), 60.0)
        bound = _proved(problem, load_LE[layer], float(full_L[layer]), slot_LP[layer], limit_s)
        found_L[layer] = max(found_L[layer], bound)
    return found_L


def _proved(problem: Problem, load_E: Floats, full: float, slot_P: Ints, limit_s: float) -> float:
    """One layer's bound: CP-SAT's, of loads rounded down."""
    model, (num_experts, ranks) = cp_model.CpModel(), (problem.num_experts, problem.num_ranks)
    most = problem.num_slots - num_experts + 1  # copies that one expert can have
    count_E = np.bincount(slot_P, minlength=num_experts)
    held_RE: NDArray[np.int64] = np.zeros((ranks, num_experts), np.int64)
    np.add.at(held_RE, (problem.rank_P, slot_P), 1)
    if problem.is_even:
        held_RE = held_RE[np.argsort(-held_RE @ (load_E / count_E), kind="stable")]
    used: list[list[cp_model.IntVar]] = [[] for _ in range(ranks)]
    units: list[list[int]] = [[] for _ in range(ranks)]
    for e in range(num_experts):
        has_C = [model.new_bool_var("") for _ in range(most)]
        model.add_exactly_one(has_C)
        for c, has in enumerate(has_C, start=1):
            on_R = []
            for r in range(ranks):
                held = model.new_int_var(0, min(c, int(problem.slots_R[r])), "")
                model.add_hint(held, int(held_RE[r, e]) if count_E[e] == c else 0)
                on_R.append(held)
                used[r].append(held)
                units[r].append(int(load_E[e] / c / problem.speed_R[r] / full * UNITS))
            model.add(sum(on_R) == c * has)
            model.add_hint(has, bool(count_E[e] == c))
    fullest = model.new_int_var(0, 2 * UNITS, "")
    rank_loads = [cp_model.LinearExpr.weighted_sum(used[r], units[r]) for r in range(ranks)]
    for r, rank_load in enumerate(rank_loads):
        model.add(rank_load <= fullest)
        model.add(sum(used[r]) == int(problem.slots_R[r]))
        if problem.is_even and r:
            model.add(rank_load <= rank_loads[r - 1])  # ranks alike have an order
    model.minimize(fullest)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds, solver.parameters.num_workers = limit_s, 2
    solver.solve(model)
    return float(solver.best_objective_bound) / UNITS * full
