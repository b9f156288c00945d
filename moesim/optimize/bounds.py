"""What no placement can do better than: proofs, by which an answer is judged.

Load: the mean rank; the busiest copy; where no expert has copies, those that must share a rank; where ranks have two
slots at most, a linear programme over numbers of copies. Traffic: each expert's closest neighbours (matching), the
singular values of the transitions (spectral), and the best split of the transitions between these two. All hold with
copies that share an expert's tokens evenly, and none looks at a solution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linprog

from moesim.optimize.balance import copies_of
from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.pairs import best_pairs, can_try_all
from moesim.optimize.problem import Problem

Floats = NDArray[np.float64]

LISTED = 8
"""Numbers of copies of an expert that `pair_load_L` tells apart."""


def least_load_L(problem: Problem, load_LE: Floats) -> Floats:
    """No placement has a fullest rank below this, in tokens of a rank of speed 1, for each layer; takes microseconds.

    >>> least_load_L(Problem.even(4, 2, 2), np.array([[6.0, 1.0, 1.0, 1.0]]))
    array([7.])
    """
    return np.array([_least_load(problem, load_E) for load_E in np.asarray(load_LE, np.float64)])


def _least_load(problem: Problem, load_E: Floats) -> float:
    fastest = float(problem.speed_R.max())
    count_E = copies_of(load_E, problem.num_slots)
    least = max(float(load_E.sum() / problem.speed_R.sum()), float((load_E / count_E).max()) / fastest)
    if problem.num_slots > problem.num_experts or not problem.is_even:
        return least
    heavy_E = np.sort(load_E)[::-1]
    size, ranks = int(problem.slots_R[0]), problem.num_ranks
    light_S = np.concatenate([[0.0], np.cumsum(heavy_E[::-1][:size])])
    for shared in range(1, size + 1):  # of the heaviest (shared - 1) R + 1, some rank has as many as `shared`
        heaviest_Q = heavy_E[: (shared - 1) * ranks + 1]
        if len(heaviest_Q) >= shared:
            least = max(least, float(heaviest_Q[-shared:].sum() + light_S[size - shared]) / fastest)
    return least


def pair_load_L(
    problem: Problem, load_LE: Floats, places: int = 20, rounds: int = 8, clock: Clock | None = None
) -> Floats:
    """As `least_load_L`, on ranks alike with two slots at most: how many copies each expert has is left to a linear
    programme, in which, for each of some loads a, no more copies are above t - a than fit beside one of a or less.

    Copies in pairs of t at most need that (Hall's condition), and a smaller t than the one found breaks it whatever the
    numbers of copies. Found by halving `rounds` times, to the lower end; layers that `clock` leaves no time for have
    the bound of `least_load_L`. Where numbers of copies are few, all are tried, and the bound is exact.
    """
    least_L = least_load_L(problem, load_LE)
    if problem.slots_R.max() != 2 or not (problem.speed_R == problem.speed_R[0]).all():
        return least_L
    alone = 2 * problem.num_ranks - problem.num_slots
    if can_try_all(problem):
        return best_pairs(problem, np.asarray(load_LE, np.float64))[1]
    for layer, load_E in enumerate(np.asarray(load_LE, np.float64)):
        if clock is not None and clock.is_over:
            break
        low, high = float(least_L[layer]), 1.3 * float(least_L[layer])
        for _ in range(rounds):
            middle = (low + high) / 2
            low, high = (low, middle) if _pairs_may_fit(problem, load_E, middle, alone, places) else (middle, high)
        least_L[layer] = low
    return least_L


def _pairs_may_fit(problem: Problem, load_E: Floats, t: float, alone: int, places: int) -> bool:
    """Whether some (fractional) numbers of copies keep every condition at a heaviest pair of t.

    An expert has the fewest copies that fit or a few more, or "many", whose loads then count as nothing.
    """
    num_experts, spare = len(load_E), problem.num_slots - problem.num_experts
    fewest_E = np.maximum(1, np.ceil(load_E / t * (1 - 1e-12))).astype(int)
    if (fewest_E - 1).sum() > spare:
        return False
    listed = LISTED if spare else 1
    copies_V = (fewest_E[:, None] + np.arange(listed)).ravel()
    size_V, expert_V = np.repeat(load_E, listed) / copies_V, np.repeat(np.arange(num_experts), listed)
    small_V = size_V[size_V <= t / 2]
    a_A = np.append(np.unique(np.quantile(small_V, np.linspace(0, 1, places))), t / 2) if len(small_V) else [t / 2]
    many = num_experts if spare else 0  # columns: options; shares of "many"; how many of these; by how much too few
    most_E = fewest_E + spare
    fits_AV = np.array([((size_V > t - a).astype(float) - (size_V <= a)) * copies_V for a in a_A])
    hall_A = sparse.hstack(
        [fits_AV, sparse.csr_matrix((len(a_A), many)), -np.ones((len(a_A), many)), -np.ones((len(a_A), 1))]
    )
    one = sparse.csr_matrix((np.ones(len(expert_V)), (expert_V, np.arange(len(expert_V)))))
    eye = sparse.identity(num_experts) if many else sparse.csr_matrix((num_experts, 0))
    none_E = sparse.csr_matrix((num_experts, 1))
    equal = sparse.vstack(
        [
            sparse.hstack([one, eye, 0 * eye, none_E]),
            sparse.csr_matrix(np.concatenate([copies_V, np.zeros(many), np.ones(many), [0.0]])),
        ]
    )
    empty = sparse.csr_matrix((many, len(copies_V)))
    few = sparse.hstack([empty, sparse.diags(fewest_E[:many] + float(listed)), -sparse.identity(many), none_E[:many]])
    much = sparse.hstack([empty, -sparse.diags(most_E[:many] * 1.0), sparse.identity(many), none_E[:many]])
    found = linprog(
        np.append(np.zeros(equal.shape[1] - 1), 1.0),
        A_ub=sparse.vstack([hall_A, few, much]) if many else hall_A,
        b_ub=np.concatenate([np.full(len(a_A), alone), np.zeros(2 * many)]),
        A_eq=equal,
        b_eq=np.append(np.ones(num_experts), problem.num_slots),
        bounds=[(0, 1)] * (len(copies_V) + many) + [(0, None)] * (many + 1),
    )
    return bool(found.status != 2 and (found.fun is None or found.fun <= 1e-6))


@dataclass(frozen=True)
class TrafficBounds:
    """Shares of transitions that leave their group in any placement that keeps the balance: three proofs."""

    matching: float
    spectral: float
    split: float

    @property
    def best(self) -> float:
        """The highest; never below 0."""
        return max(0.0, self.matching, self.spectral, self.split)


def least_left(
    problem: Problem, demand: Demand, level: str, share_L: Floats, clock: Clock, rounds: int = 40
) -> TrafficBounds:
    """The least share of transitions that go to another group of ranks ("rank", "node", "rack").

    With x and y the shares of experts in groups, in two layers that follow each other, and W their transitions, what
    stays is the sum of x' W y over groups. It is at most what each expert's closest neighbours are, as many as a group
    has slots (matching); and, since no group has more than a share c of either layer's load, at most c times the sum
    of the 1 / c largest singular values of W over the roots of both layers' loads (spectral). The same holds of the
    two parts of W = R + S with one bound for each; the best R is sought by subgradients, `rounds` of them.

    Args:
        share_L: the largest share of a layer's load that a group may have.
        clock: where it is over, fewer rounds.
    """
    share_N = np.array([share_L[layer : layer + 2].max() for layer in range(len(demand.next_LEE))])
    return _least(problem, demand.next_LEE, level, share_N, clock, rounds)


def least_spread(problem: Problem, demand: Demand, share_L: Floats, clock: Clock, rounds: int = 40) -> TrafficBounds:
    """The least share of pairs of one token's choices in one layer that lie in different nodes: as `least_left`, with
    both choices placed alike."""
    return _least(problem, demand.together_LEE, "node", share_L, clock, rounds)


def _least(
    problem: Problem, pairs_NEE: NDArray[np.float32], level: str, share_N: Floats, clock: Clock, rounds: int
) -> TrafficBounds:
    slots = int(np.bincount(problem.group_R(level), weights=problem.slots_R).max())
    total = float(pairs_NEE.sum())
    stays = np.zeros(3)
    if not total:
        return TrafficBounds(0.0, 0.0, 0.0)
    for pairs_EE, share in zip(pairs_NEE, share_N, strict=True):
        of_layer = float(pairs_EE.sum())
        if of_layer:
            whole_EE = np.asarray(pairs_EE / of_layer, np.float32)
            stays += of_layer * np.minimum(1.0, _stay(whole_EE, slots, float(share), clock, rounds))
    return TrafficBounds(*(1 - stays / total).tolist())


def _stay(whole_EE: NDArray[np.float32], slots: int, share: float, clock: Clock, rounds: int) -> Floats:
    """At most so much stays: by matching, by spectral, by the best split of both."""
    scale_EE = 1 / np.sqrt((whole_EE.sum(axis=1)[:, None] + 1e-12) * (whole_EE.sum(axis=0) + 1e-12))
    share = min(1.0, share)

    def spectral(part_EE: NDArray[np.float32]) -> tuple[float, NDArray[np.float32]]:
        left, sigma, right = np.linalg.svd(part_EE * scale_EE, full_matrices=False)
        weight = np.clip(1 / share - np.arange(len(sigma)), 0, 1).astype(np.float32)
        return share * float((sigma * weight).sum()), share * ((left * weight) @ right) * scale_EE

    def matching(part_EE: NDArray[np.float32]) -> tuple[float, NDArray[np.float32]]:
        taken_EE = np.ones_like(part_EE)
        if slots < part_EE.shape[1]:
            np.put_along_axis(taken_EE, np.argpartition(-part_EE, slots - 1, axis=1)[:, slots:], 0.0, axis=1)
        taken_EE *= part_EE > 0
        return float((part_EE * taken_EE).sum()), taken_EE

    by_matching, by_spectral = matching(whole_EE)[0], spectral(whole_EE)[0]
    best = min(by_matching, by_spectral)
    goal = share + 0.6 * (best - share)  # where the steps aim at; any goal gives bounds that hold
    metric_EE, near_EE = 1 / scale_EE**2, np.zeros_like(whole_EE)
    for _ in range(rounds):
        if clock.is_over:
            break
        (far, far_EE), (near, taken_EE) = spectral(whole_EE - near_EE), matching(near_EE)
        best = min(best, far + near)
        slope_EE = taken_EE - far_EE
        length = float((metric_EE * slope_EE**2).sum())
        if far + near <= goal:
            goal = share + 0.9 * (far + near - share)
        if length <= 0:
            break
        near_EE = near_EE - np.float32(0.5 * (far + near - goal) / length) * metric_EE * slope_EE
    return np.array([by_matching, by_spectral, best])
