"""Compiled annealing over placements: swaps of two experts, or of all experts of two ranks, that keep the balance.

What is made small is what leaves its group: of pairs of experts that one token chooses in layers that follow each other
("next"), or in one layer ("together"), on groups of ranks at one or more levels (node, rack, rank), an expert's copies
sharing its tokens evenly. A table of how much each expert has to do with each group makes the worth of a swap known
in a few look-ups; only a swap that is made costs a pass over the experts of its layer and of both neighbours."""

from __future__ import annotations

import numpy as np
from numba import njit

WHOLE = 0.1
"""Share of tries that swap all that two ranks hold."""


@njit(cache=True)
def _attract(table_VLEG, v, layer, expert, group, share, next_LEE, together_LEE, next_w, alike_w):  # type: ignore[no-untyped-def]
    """What a share of `expert`, coming to `group` (or leaving, below 0), means for experts of its layer and of both
    neighbours."""
    num_layers, num_experts = table_VLEG.shape[1], table_VLEG.shape[2]
    near, alike = np.float32(share * next_w), np.float32(share * alike_w)
    if near != 0:
        if layer > 0:
            for e in range(num_experts):
                table_VLEG[v, layer - 1, e, group] += near * next_LEE[layer - 1, e, expert]
        if layer + 1 < num_layers:
            for e in range(num_experts):
                table_VLEG[v, layer + 1, e, group] += near * next_LEE[layer, expert, e]
    if alike != 0:
        for e in range(num_experts):
            table_VLEG[v, layer, e, group] += alike * together_LEE[layer, expert, e]


@njit(cache=True)
def attractions(slot_LP, group_VP, num_groups, count_LE, next_LEE, together_LEE, next_V, alike_V):  # type: ignore[no-untyped-def]
    """What each expert would keep in each group, being there: float32 [V, L, E, G], in units of the objective."""
    num_layers, num_slots = slot_LP.shape
    table_VLEG = np.zeros((group_VP.shape[0], num_layers, count_LE.shape[1], num_groups), np.float32)
    for v in range(group_VP.shape[0]):
        for layer in range(num_layers):
            for p in range(num_slots):
                e = slot_LP[layer, p]
                _attract(
                    table_VLEG, v, layer, e, group_VP[v, p], 1.0 / count_LE[layer, e], next_LEE, together_LEE,
                    next_V[v], alike_V[v],
                )  # fmt: skip
    return table_VLEG


@njit(cache=True)
def _holds(slot_P, first, last, expert):  # type: ignore[no-untyped-def]
    for p in range(first, last):  # noqa: SIM110  (compiled)
        if slot_P[p] == expert:
            return True
    return False


@njit(cache=True)
def _fullest(sums_R, speed_R):  # type: ignore[no-untyped-def]
    fullest = 0.0
    for r in range(len(sums_R)):
        fullest = max(fullest, sums_R[r] / speed_R[r])
    return fullest


@njit(cache=True)
def _parted(layer, slot_P, p, q, size, count_E, together_LEE):  # type: ignore[no-untyped-def]
    """What the table counts wrongly where experts of one layer move at once: those that change places were counted as
    if the other stayed, those that move together as if they parted."""
    wrong = 0.0
    for i in range(size):
        e, f = slot_P[p + i], slot_P[q + i]
        for j in range(size):
            g = slot_P[q + j]
            wrong -= together_LEE[layer, e, g] / (count_E[e] * count_E[g])
            if j > i:
                h = slot_P[p + j]
                wrong += together_LEE[layer, e, h] / (count_E[e] * count_E[h])
                wrong += together_LEE[layer, f, g] / (count_E[f] * count_E[g])
    return 2 * wrong


@njit(cache=True)
def anneal(  # type: ignore[no-untyped-def]
    slot_LP, first_R, rank_P, node_R, speed_R, group_VP, next_V, alike_V, table_VLEG, count_LE, next_LEE, together_LEE,
    load_LE, rank_LR, cap_L, node_LN, node_cap_LN, share_SLE, step_LSR, worth_S, today_LP, move_w, heat, num_tries,
):  # fmt: skip
    """Try `num_tries` swaps in every layer, in place, at one temperature; the gain of the objective.

    rank_LR, node_LN: load; cap_L, node_cap_LN: what no rank (at its speed) and no node may exceed, unless it does
        before.
    share_SLE, step_LSR: load of a copy of each expert, and of each rank, in steps whose fullest rank costs `worth_S`.
    heat: 0 takes only what is better.
    """
    num_layers, num_slots = slot_LP.shape
    num_levels, num_steps = len(next_V), len(worth_S)
    has_alike = np.abs(alike_V).sum() > 0
    gained = 0.0
    for layer in range(num_layers):
        slot_P, count_E, load_E = slot_LP[layer], count_LE[layer], load_LE[layer]
        rank_R, node_N = rank_LR[layer], node_LN[layer]
        for _ in range(num_tries):
            p, q = np.random.randint(num_slots), np.random.randint(num_slots)
            a, b = rank_P[p], rank_P[q]
            if a == b:
                continue
            e, f, size = slot_P[p], slot_P[q], 1
            whole = np.random.random() < WHOLE
            if whole:  # all that two ranks hold
                size = first_R[a + 1] - first_R[a]
                if size != first_R[b + 1] - first_R[b] or speed_R[a] != speed_R[b]:
                    continue
                p, q = first_R[a], first_R[b]
                moved = rank_R[a] - rank_R[b]
            else:
                if e == f:
                    continue
                moved = load_E[e] / count_E[e] - load_E[f] / count_E[f]
                if count_E[e] > 1 and _holds(slot_P, first_R[b], first_R[b + 1], e):
                    continue
                if count_E[f] > 1 and _holds(slot_P, first_R[a], first_R[a + 1], f):
                    continue
                if moved > 0:
                    if (rank_R[b] + moved) / speed_R[b] > cap_L[layer]:
                        continue
                elif moved < 0 and (rank_R[a] - moved) / speed_R[a] > cap_L[layer]:
                    continue
            na, nb = node_R[a], node_R[b]
            if na != nb:
                if moved > 0:
                    if node_N[nb] + moved > node_cap_LN[layer, nb]:
                        continue
                elif moved < 0 and node_N[na] - moved > node_cap_LN[layer, na]:
                    continue
            gain = 0.0
            for v in range(num_levels):
                ga, gb = group_VP[v, p], group_VP[v, q]
                if ga != gb:
                    for i in range(size):
                        e, f = slot_P[p + i], slot_P[q + i]
                        gain += (table_VLEG[v, layer, e, gb] - table_VLEG[v, layer, e, ga]) / count_E[e]
                        gain += (table_VLEG[v, layer, f, ga] - table_VLEG[v, layer, f, gb]) / count_E[f]
                    if has_alike:
                        gain += alike_V[v] * _parted(layer, slot_P, p, q, size, count_E, together_LEE)
            if move_w > 0:
                for i in range(size):
                    for expert, old, new in ((slot_P[p + i], a, b), (slot_P[q + i], b, a)):
                        was = _holds(today_LP[layer], first_R[old], first_R[old + 1], expert)
                        will = _holds(today_LP[layer], first_R[new], first_R[new + 1], expert)
                        gain += move_w * (int(will) - int(was))
            if not whole:
                for s in range(num_steps):
                    step_R, shift = step_LSR[layer, s], share_SLE[s, layer, e] - share_SLE[s, layer, f]
                    before = _fullest(step_R, speed_R)
                    step_R[a] -= shift
                    step_R[b] += shift
                    gain += worth_S[s] * (before - _fullest(step_R, speed_R))
                    step_R[a] += shift
                    step_R[b] -= shift
            if gain <= 0 and (heat <= 0 or np.random.random() >= np.exp(gain / heat)):
                continue
            gained += gain
            for i in range(size):
                e, f = slot_P[p + i], slot_P[q + i]
                for v in range(num_levels):
                    ga, gb = group_VP[v, p], group_VP[v, q]
                    if ga != gb:
                        for expert, old, new in ((e, ga, gb), (f, gb, ga)):
                            share = 1.0 / count_E[expert]
                            _attract(
                                table_VLEG, v, layer, expert, old, -share, next_LEE, together_LEE, next_V[v], alike_V[v]
                            )
                            _attract(
                                table_VLEG, v, layer, expert, new, share, next_LEE, together_LEE, next_V[v], alike_V[v]
                            )
                slot_P[p + i], slot_P[q + i] = f, e
            rank_R[a] -= moved
            rank_R[b] += moved
            node_N[na] -= moved
            node_N[nb] += moved
            for s in range(num_steps):
                step_R = step_LSR[layer, s]
                if whole:
                    step_R[a], step_R[b] = step_R[b], step_R[a]
                else:
                    shift = share_SLE[s, layer, e] - share_SLE[s, layer, f]
                    step_R[a] -= shift
                    step_R[b] += shift
    return gained
