"""Balanced placement, compiled: as many copies as EPLB, longest first, then swaps and moves of copies.

Of one layer, alone: E experts with loads, P slots on R ranks. An expert with c copies puts load / c on each of their
ranks; a rank of speed v with a load of x is as full as one of speed 1 with x / v. What is wanted is the least fullest
rank.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.optimize.problem import Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]

SLACK = 1e-3
"""How near to the bound a layer is good enough."""
KICKS, MOVES, DONORS = 20, 8, 4
"""Random trades; moves of a copy, from one of so many lightest experts: what is tried where swaps do not get so far."""
PAIR_MOVES, PAIR_DONORS = 200, 8
"""The same where ranks have two slots at most, and a try costs a microsecond."""


@njit(cache=True)
def copies_of(load_E, num_slots):  # type: ignore[no-untyped-def]
    """Copies of each expert, [E]: every further one goes to the expert whose copies are the busiest.

    No numbers of copies give a smaller load of the busiest copy. Source: as EPLB does.
    """
    count_E = np.ones(len(load_E), np.int64)
    for _ in range(num_slots - len(load_E)):
        count_E[np.argmax(load_E / count_E)] += 1
    return count_E


@njit(cache=True)
def _ascending(values):  # type: ignore[no-untyped-def]
    """Indices in ascending order, those alike in their own: compiled once, for everything that sorts."""
    return np.argsort(values, kind="mergesort")


@njit(cache=True)
def _most(values, over):  # type: ignore[no-untyped-def]
    """The largest of `values`, each over its own."""
    most = values[0] / over[0]
    for i in range(1, len(values)):
        most = max(most, values[i] / over[i])
    return most


@njit(cache=True)
def _packed(load_P, size_R, speed_R):  # type: ignore[no-untyped-def]
    """Items on ranks, [R, S]: the heaviest first, to the rank that is then the least full; loads, [R]."""
    num_ranks = len(size_R)
    item_RS = np.full((num_ranks, size_R.max()), -1, np.int64)
    filled_R, rank_R = np.zeros(num_ranks, np.int64), np.zeros(num_ranks)
    for item in _ascending(-load_P):
        best, least = -1, np.inf
        for r in range(num_ranks):
            if filled_R[r] < size_R[r]:
                full = (rank_R[r] + load_P[item]) / speed_R[r]
                if full < least:
                    best, least = r, full
        item_RS[best, filled_R[best]] = item
        filled_R[best] += 1
        rank_R[best] += load_P[item]
    return item_RS, rank_R


@njit(cache=True)
def _fullest(rank_R, speed_R):  # type: ignore[no-untyped-def]
    fullest = 0
    for r in range(1, len(rank_R)):
        if rank_R[r] * speed_R[fullest] > rank_R[fullest] * speed_R[r]:
            fullest = r
    return fullest


@njit(cache=True)
def _swap(load_P, item_RS, rank_R, size_R, speed_R, target):  # type: ignore[no-untyped-def]
    """Swap an item of the fullest rank for one of another rank, the swap that leaves the fuller of both least full, as
    long as that helps and the fullest rank is above `target`."""
    for _ in range(20 * len(rank_R)):
        a = _fullest(rank_R, speed_R)
        now = rank_R[a] / speed_R[a]
        if now <= target:
            return
        least, gone, other, into = now, -1, -1, -1
        for b in range(len(rank_R)):
            if b == a or rank_R[b] / speed_R[b] >= least:
                continue
            for i in range(size_R[a]):
                mine = load_P[item_RS[a, i]]
                for j in range(size_R[b]):
                    moved = mine - load_P[item_RS[b, j]]
                    if moved > 0:
                        fuller = max((rank_R[a] - moved) / speed_R[a], (rank_R[b] + moved) / speed_R[b])
                        if fuller < least:
                            least, gone, other, into = fuller, i, b, j
        if gone < 0 or least >= now * (1 - 1e-12):
            return
        moved = load_P[item_RS[a, gone]] - load_P[item_RS[other, into]]
        item_RS[a, gone], item_RS[other, into] = item_RS[other, into], item_RS[a, gone]
        rank_R[a] -= moved
        rank_R[other] += moved


@njit(cache=True)
def _packed_best(load_E, count_E, size_R, speed_R, target, kicks):  # type: ignore[no-untyped-def]
    """Longest first, swaps, and trades with swaps after each: expert in each slot, [P]; how full the fullest is."""
    num_slots, num_ranks = count_E.sum(), len(size_R)
    expert_P, load_P = np.zeros(num_slots, np.int64), np.zeros(num_slots)
    p = 0
    for e in range(len(load_E)):
        for _ in range(count_E[e]):
            expert_P[p], load_P[p] = e, load_E[e] / count_E[e]
            p += 1
    item_RS, rank_R = _packed(load_P, size_R, speed_R)
    _swap(load_P, item_RS, rank_R, size_R, speed_R, target)
    best_RS, best_R = item_RS.copy(), rank_R.copy()
    best = _most(best_R, speed_R)
    for _ in range(kicks):
        if best <= target:
            break
        a = _fullest(rank_R, speed_R)
        for _ in range(2):  # trade an item of the fullest rank for any other, and go on from there
            b = np.random.randint(num_ranks)
            if a == b or size_R[b] == 0:
                continue
            i, j = np.random.randint(size_R[a]), np.random.randint(size_R[b])
            moved = load_P[item_RS[a, i]] - load_P[item_RS[b, j]]
            item_RS[a, i], item_RS[b, j] = item_RS[b, j], item_RS[a, i]
            rank_R[a] -= moved
            rank_R[b] += moved
        _swap(load_P, item_RS, rank_R, size_R, speed_R, target)
        now = _most(rank_R, speed_R)
        if now < best:
            best, best_RS, best_R = now, item_RS.copy(), rank_R.copy()
        elif now > best * (1 + 1e-3):
            item_RS, rank_R = best_RS.copy(), best_R.copy()
    slot_P = np.zeros(num_slots, np.int32)
    p = 0
    for r in range(num_ranks):
        for i in range(size_R[r]):
            slot_P[p] = expert_P[best_RS[r, i]]
            p += 1
    return slot_P, best


@njit(cache=True)
def _merged(value_P, owner_P, load_E, count_E, taker, giver, into_P, owners_P):  # type: ignore[no-untyped-def]
    """The copies' loads in order after a copy went from `giver` to `taker` (none where alike), into the last two."""
    more, fewer = load_E[taker] / (count_E[taker] + 1), load_E[giver] / max(count_E[giver] - 1, 1)
    left_more, left_fewer = count_E[taker] + 1, count_E[giver] - 1
    n = 0
    for p in range(len(value_P) + 1):
        value = value_P[p] if p < len(value_P) else np.inf
        while (left_more > 0 and more <= value) or (left_fewer > 0 and fewer <= value):
            if left_more > 0 and (left_fewer == 0 or more <= fewer):
                into_P[n], owners_P[n] = more, taker
                left_more -= 1
            else:
                into_P[n], owners_P[n] = fewer, giver
                left_fewer -= 1
            n += 1
        if p < len(value_P) and owner_P[p] != taker and owner_P[p] != giver:
            into_P[n], owners_P[n] = value, owner_P[p]
            n += 1


@njit(cache=True)
def _pairs(value_P, num_ranks, mean, limit):  # type: ignore[no-untyped-def]
    """The heaviest of the pairs (of the lightest with the heaviest), which one it is, and what all of them above the
    mean cost together; counting ends at `limit`."""
    num_slots = len(value_P)
    alone = 2 * num_ranks - num_slots
    heaviest, at, cost = -1.0, 0, 0.0
    for r in range(num_ranks):
        pair = value_P[num_slots - 1 - r]
        if r >= alone:
            pair += value_P[r - alone]
        if pair > heaviest:
            heaviest, at = pair, r
        if pair > mean:
            above = (pair - mean) * (pair - mean)
            cost += above * above
            if cost >= limit:
                break
    return heaviest, at, cost


@njit(cache=True)
def _paired(load_E, count_E, num_ranks, target, moves, donors):  # type: ignore[no-untyped-def]
    """On ranks alike that hold two copies each (or one, where there are too few): the lightest with the heaviest.

    No other pairs of the same copies have a smaller heaviest pair. Then an expert of the heaviest pair takes a copy
    from one of those that are the lightest without it, wherever that makes what lies above the mean, to the fourth
    power, less: the heaviest pair alone would not tell between moves while several are as heavy. Expert in each slot of
    two on each rank, [2 R], -1 where there is none.
    """
    num_slots = count_E.sum()
    alone = 2 * num_ranks - num_slots
    value_P, owner_P = np.empty(num_slots), np.empty(num_slots, np.int64)
    p = 0
    for e in range(len(load_E)):
        for _ in range(count_E[e]):
            value_P[p], owner_P[p] = load_E[e] / count_E[e], e
            p += 1
    order = _ascending(value_P)
    value_P, owner_P = value_P[order], owner_P[order]
    tried_P, tried_owner_P = np.empty(num_slots), np.empty(num_slots, np.int64)
    without_E = np.empty(len(load_E))
    mean = max(load_E.sum() / num_ranks, 1e-300)
    heaviest, at, cost = _pairs(value_P, num_ranks, mean, np.inf)
    for _ in range(moves if num_slots > len(load_E) else 0):
        if heaviest <= target:
            break
        for e in range(len(load_E)):
            without_E[e] = load_E[e] / (count_E[e] - 1) if count_E[e] > 1 else np.inf
        has_moved = False
        for _ in range(donors):
            giver = np.argmin(without_E)
            if has_moved or without_E[giver] == np.inf:
                break
            without_E[giver] = np.inf
            for side in range(2):
                if has_moved or (side == 1 and at < alone):
                    continue
                taker = owner_P[num_slots - 1 - at] if side == 0 else owner_P[at - alone]
                if taker == giver or count_E[taker] >= num_ranks:
                    continue
                _merged(value_P, owner_P, load_E, count_E, taker, giver, tried_P, tried_owner_P)
                now, now_at, now_cost = _pairs(tried_P, num_ranks, mean, cost * (1 - 1e-9))
                if now_cost < cost * (1 - 1e-9):
                    value_P, tried_P = tried_P, value_P
                    owner_P, tried_owner_P = tried_owner_P, owner_P
                    count_E[taker] += 1
                    count_E[giver] -= 1
                    heaviest, at, cost = now, now_at, now_cost
                    has_moved = True
        if not has_moved:
            break
    slot_P = np.full(2 * num_ranks, -1, np.int64)
    for r in range(num_ranks):
        slot_P[2 * r] = owner_P[num_slots - 1 - r]
        if r >= alone:
            slot_P[2 * r + 1] = owner_P[r - alone]
    return slot_P


@njit(cache=True)
def _busiest(slot_P, first_R, load_E, count_E, speed_R):  # type: ignore[no-untyped-def]
    busiest, most = 0, -1.0
    for r in range(len(speed_R)):
        total = 0.0
        for p in range(first_R[r], first_R[r + 1]):
            total += load_E[slot_P[p]] / count_E[slot_P[p]]
        if total / speed_R[r] > most:
            busiest, most = r, total / speed_R[r]
    return busiest


@njit(cache=True)
def _target(load_E, count_E, speed_R):  # type: ignore[no-untyped-def]
    """How full the fullest rank may be for a layer to be good enough: the mean, or the busiest copy, and `SLACK`."""
    return max(load_E.sum() / speed_R.sum(), _most(load_E, count_E) / speed_R.max()) * (1 + SLACK)


@njit(cache=True)
def in_pairs(load_E, count_E, first_R, speed_R, moves, donors):  # type: ignore[no-untyped-def]
    """Expert in each slot, [P], of ranks of one slot or two; the best for these copies, before `moves` change them."""
    num_ranks, num_slots = len(speed_R), first_R[-1]
    pair_P = _paired(load_E, count_E, num_ranks, _target(load_E, count_E, speed_R), moves, donors)
    slot_P = np.empty(num_slots, np.int32)
    r1, r2 = 0, 2 * num_ranks - num_slots  # ranks of one slot and of two, in the order of their pairs
    for r in range(num_ranks):
        p = first_R[r]
        if first_R[r + 1] - p == 1:
            slot_P[p] = pair_P[2 * r1]
            r1 += 1
        else:
            slot_P[p], slot_P[p + 1] = pair_P[2 * r2], pair_P[2 * r2 + 1]
            r2 += 1
    return slot_P


@njit(cache=True)
def _in_many(load_E, first_R, speed_R, kicks):  # type: ignore[no-untyped-def]
    """Packed; then copies move from an expert that is light without one to one of the fullest rank, while that helps:
    expert in each slot, [P]."""
    np.random.seed(0)
    size_R, count_E = first_R[1:] - first_R[:-1], copies_of(load_E, first_R[-1])
    target = _target(load_E, count_E, speed_R)
    best_P, best = _packed_best(load_E, count_E, size_R, speed_R, target, kicks)
    without_E, none = np.empty(len(load_E)), 0 * kicks  # of one type with kicks, so that packing is compiled once
    for _ in range(MOVES):
        if best <= target or len(best_P) == len(load_E):
            break
        a, now = _busiest(best_P, first_R, load_E, count_E, speed_R), best
        for e in range(len(load_E)):
            without_E[e] = load_E[e] / (count_E[e] - 1) if count_E[e] > 1 else np.inf
        givers, from_P, from_E = _ascending(without_E)[:DONORS], best_P, count_E
        for p in range(first_R[a], first_R[a + 1]):
            e = from_P[p]
            for d in givers:
                if d == e or from_E[d] < 2 or from_E[e] >= len(speed_R):
                    continue
                tried_E = from_E.copy()
                tried_E[d] -= 1
                tried_E[e] += 1
                tried_P, tried = _packed_best(load_E, tried_E, size_R, speed_R, target, none)
                if tried < best * (1 - 1e-9):
                    best_P, best, count_E = tried_P, tried, tried_E
        if best >= now:
            break
    return best_P


def balanced(problem: Problem, load_LE: Floats, pair_donors: int = PAIR_DONORS) -> Ints:
    """Expert in each slot, int32 [L, P]; the same for the same loads of a layer.

    pair_donors: experts that may give a copy, where ranks have two slots at most: time for evenness.

    Source: Graham, SIAM Journal on Applied Mathematics 1969, for packing longest first; the rest is our own.
    """
    first_R, speed_R = problem.first_R, problem.speed_R
    if not problem.has_pairs:  # the compiled halves are large: one is enough
        return np.array([_in_many(load_E, first_R, speed_R, KICKS) for load_E in load_LE], np.int32)
    counts = [copies_of(load_E, problem.num_slots) for load_E in load_LE]
    return np.array(
        [
            in_pairs(load_E, count_E, first_R, speed_R, PAIR_MOVES, pair_donors)
            for load_E, count_E in zip(load_LE, counts, strict=True)
        ],
        np.int32,
    )
