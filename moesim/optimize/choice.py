"""Which of its copies computes a token's expert, at run time: in turn, at random, the nearest, by a small programme."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from moesim.optimize.demand import Demand
from moesim.optimize.problem import Floats, Ints, Problem
from moesim.optimize.score import fullest_SL, rank_sums, shares_LP, slot_load_SLP


@dataclass(frozen=True)
class Chosen:
    """What a choice leads to.

    steps: fullest rank over the mean, mean of steps and layers.
    away: share of choices that a rank of another node computes, where tokens start on all ranks alike.
    """

    steps: float
    away: float


def in_turn(problem: Problem, slot_LP: Ints, load_SLE: Floats) -> Floats:
    """Round robin: tokens of each slot, [S, L, P]; copies get as many."""
    return slot_load_SLP(problem, slot_LP, load_SLE)


def at_random(problem: Problem, slot_LP: Ints, load_SLE: Floats) -> Floats:
    """Every token draws a copy."""
    rng, found = np.random.default_rng(0), in_turn(problem, slot_LP, load_SLE)
    for layer, slot_P in enumerate(slot_LP):
        for expert in np.flatnonzero(problem.counts(slot_P[None])[0] > 1):
            slots = np.flatnonzero(slot_P == expert)
            tokens_S = np.rint(load_SLE[:, layer, expert]).astype(np.int64)
            found[:, layer, slots] = rng.multinomial(tokens_S, np.full(len(slots), 1 / len(slots)))
    return found


def _even_home_P(problem: Problem) -> Floats:
    """Share of a slot's tokens that start in its node, [P], if any token may go there."""
    return np.asarray((np.bincount(problem.node_R) / problem.num_ranks)[problem.node_R[problem.rank_P]])


def _near(problem: Problem, slot_LP: Ints) -> tuple[Floats, Floats]:
    """If the nearest copy is taken, on the token's own rank, else of its node, else any, in turn among several: each
    slot's share of its expert's tokens, and the share of a slot's tokens that start in its node, [L, P]."""
    ranks, node_R = problem.num_ranks, problem.node_R
    share_LP = shares_LP(problem, slot_LP)
    home_LP = np.tile(_even_home_P(problem), (len(slot_LP), 1))
    for layer, slot_P in enumerate(slot_LP):
        for expert in np.flatnonzero(problem.counts(slot_P[None])[0] > 1):
            slots = np.flatnonzero(slot_P == expert)
            own_CR = problem.rank_P[slots][:, None] == np.arange(ranks)
            near_CR = node_R[problem.rank_P[slots]][:, None] == node_R
            ways_CR = np.where(own_CR.any(axis=0), own_CR, np.where(near_CR.any(axis=0), near_CR, True))
            share_CR = ways_CR / ways_CR.sum(axis=0) / ranks
            share_LP[layer, slots] = share_CR.sum(axis=1)
            home_LP[layer, slots] = (share_CR * near_CR).sum(axis=1) / np.maximum(share_CR.sum(axis=1), 1e-300)
    return share_LP, home_LP


def nearest(problem: Problem, slot_LP: Ints, load_SLE: Floats) -> Floats:
    """A copy on the token's own rank, else of its node, else any."""
    return slot_load_SLP(problem, slot_LP, load_SLE, _near(problem, slot_LP)[0])


def least_loaded(problem: Problem, slot_LP: Ints, load_SLE: Floats) -> Floats:
    """The shares that make the fullest rank of this very step least full: a linear programme for each step and layer,
    as LPLB solves on the device."""
    found = in_turn(problem, slot_LP, load_SLE)
    for layer, slot_P in enumerate(slot_LP):
        free = np.flatnonzero(problem.counts(slot_P[None])[0][slot_P] > 1)
        if not len(free):
            continue
        experts, row = np.unique(slot_P[free], return_inverse=True)
        ranks = np.arange(problem.num_ranks)[:, None]
        fill = np.column_stack([problem.rank_P[free] == ranks, -problem.speed_R])  # what a rank gets, less z its speed
        whole = np.column_stack([row == np.arange(len(experts))[:, None], np.zeros(len(experts))])
        cost = np.append(np.zeros(len(free)), 1.0)
        fixed_SP = found[:, layer].copy()
        fixed_SP[:, free] = 0
        for step, fixed_P in enumerate(fixed_SP):
            fixed_R = np.bincount(problem.rank_P, weights=fixed_P, minlength=problem.num_ranks)
            solved = linprog(cost, A_ub=fill, b_ub=-fixed_R, A_eq=whole, b_eq=load_SLE[step, layer, experts])
            found[step, layer, free] = solved.x[:-1]
    return found


CHOICES: dict[str, Callable[[Problem, Ints, Floats], Floats]] = {
    "in turn": in_turn, "at random": at_random, "nearest": nearest, "least loaded": least_loaded,
}  # fmt: skip


def choices(problem: Problem, slot_LP: Ints, demand: Demand, most_steps: int = 8) -> dict[str, Chosen]:
    """Every choice on up to `most_steps` steps of a demand, spread over it."""
    steps = np.unique(np.linspace(0, len(demand.load_SLE) - 1, most_steps).round().astype(int))
    load_SLE, found = demand.load_SLE[steps], {}
    for name, choose in CHOICES.items():
        load_SLP = choose(problem, slot_LP, load_SLE)
        home_SLP = load_SLP * (_near(problem, slot_LP)[1] if choose is nearest else _even_home_P(problem))
        full = float(fullest_SL(problem, rank_sums(problem, load_SLP)).mean())
        found[name] = Chosen(full, 1 - float(home_SLP.sum() / max(load_SLP.sum(), 1e-300)))
    return found
