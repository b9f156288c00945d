"""Compiled parts of the trace generator: walks over fitted tokens, and copies of their experts in a wanted shape."""

from __future__ import annotations

import numpy as np
from numba import njit

_TRIES = 12  # requests looked into for a token of the wanted class before the walk just goes on


@njit(cache=True)
def _mate(label, home, near_QN, key_T, order_T, next_T, rng):  # type: ignore[no-untyped-def]
    """A fitted token of class `label` that has a successor, from the home request or (every second try) one near it;
    -1 where none was found.
    """
    num_requests = near_QN.shape[0]
    for attempt in range(_TRIES):
        request = near_QN[home, rng.integers(0, near_QN.shape[1])] if attempt % 2 else home
        if attempt == 0 and rng.random() < 0.5:
            continue
        key = label * num_requests + request
        low, high = np.searchsorted(key_T, key), np.searchsorted(key_T, key + 1)
        if high > low:
            token = order_T[low + rng.integers(0, high - low)]
            if next_T[token] >= 0:
                return token
    return -1


@njit(cache=True)
def walk(  # type: ignore[no-untyped-def]
    home_N, length_NP, enter_QP, class_T, near_QN, key_T, order_T, next_T,
    num_base, run_tokens, crossover_rate, rng, donor_BL,
):  # fmt: skip
    """Fill `donor_BL`, the fitted token that each generated token copies in each layer; B tokens, N requests.

    A request follows the tokens of its home request. At the end of a run (geometric, `run_tokens` on average) it jumps
    to a token of the same class as the one that would have come next. With probability `crossover_rate` the layers
    from a drawn one on follow another run, started at a token of the same class. Layers beyond the `num_base` fitted
    ones are further stacks of them; each follows a run of its own.
    """
    num_layers = donor_BL.shape[1]
    num_stacks = (num_layers + num_base - 1) // num_base
    lead_S, cross_S = np.full(num_stacks, -1, np.int64), np.full(num_stacks, -1, np.int64)
    at_S = np.full(num_stacks, num_base, np.int64)
    row = 0
    for n in range(home_N.size):
        home = home_N[n]
        for phase in range(2):
            for step in range(length_NP[n, phase]):
                starts = step == 0 or rng.random() * run_tokens < 1.0
                if step == 0:
                    token = enter_QP[home, phase]
                else:
                    token = next_T[lead_S[0]]
                    label = class_T[token if token >= 0 else lead_S[0]]
                    if starts or token < 0:
                        mate = _mate(label, home, near_QN, key_T, order_T, next_T, rng)
                        if mate >= 0:
                            token = mate if token >= 0 else next_T[mate]
                            starts = True
                    if token < 0:
                        token = enter_QP[home, phase]
                lead_S[0] = token
                for s in range(num_stacks):
                    if s:
                        lead_S[s] = -1 if starts or lead_S[s] < 0 else next_T[lead_S[s]]
                        if lead_S[s] < 0:
                            mate = _mate(class_T[token], home, near_QN, key_T, order_T, next_T, rng)
                            lead_S[s] = token if mate < 0 else mate
                    if starts:
                        crosses = num_base > 1 and rng.random() < crossover_rate
                        at_S[s] = rng.integers(1, num_base) if crosses else num_base
                        cross_S[s] = -1
                    cross_S[s] = next_T[cross_S[s]] if cross_S[s] >= 0 else -1
                    if at_S[s] < num_base and cross_S[s] < 0:
                        mate = _mate(class_T[lead_S[s]], home, near_QN, key_T, order_T, next_T, rng)
                        cross_S[s] = lead_S[s] if mate < 0 else mate
                    base = s * num_base
                    for layer in range(min(num_base, num_layers - base)):
                        donor_BL[row, base + layer] = lead_S[s] if layer < at_S[s] else cross_S[s]
                row += 1


@njit(cache=True)
def copy_experts(donor_BL, ids_TLK, ids_BLK):  # type: ignore[no-untyped-def]
    """`ids_BLK[b, l]` becomes the experts of token `donor_BL[b, l]` in layer l, in the fitted shape."""
    for b in range(ids_BLK.shape[0]):
        for layer in range(ids_BLK.shape[1]):
            token = donor_BL[b, layer]
            for k in range(ids_BLK.shape[2]):
                ids_BLK[b, layer, k] = ids_TLK[token, layer, k]


@njit(cache=True)
def spread_experts(  # type: ignore[no-untyped-def]
    donor_BL, class_T, ids_TLK, weights_TLK, num_experts, num_children, ids_BLK, weights_BLK
):
    """As `copy_experts`, in another shape, with weights.

    Fitted expert e of E stands for the experts e E' / E to (e + 1) E' / E of the E' wanted; which of them a token takes
    is a hash of its class, so that tokens of a kind agree. Where more experts a token are wanted than were fitted, the
    heaviest parents give a second one and share their weight. Experts are distinct; a taken one gives way to the next.
    """
    num_base, top_k = ids_TLK.shape[1], ids_TLK.shape[2]
    wanted = ids_BLK.shape[2]
    stamp_E = np.full(num_children, -1, np.int64)
    for b in range(ids_BLK.shape[0]):
        for layer in range(ids_BLK.shape[1]):
            token, base, stamp = donor_BL[b, layer], layer % num_base, b * ids_BLK.shape[1] + layer
            mass, kept = np.float32(0), np.float32(0)
            for k in range(top_k):
                mass += np.float32(weights_TLK[token, base, k])
            for i in range(wanted):
                k, turn = i % top_k, i // top_k
                parent = np.int64(ids_TLK[token, base, k])
                low = parent * num_children // num_experts
                size = max((parent + 1) * num_children // num_experts - low, 1)
                mixed = np.uint32(class_T[token] * 2654435761 + base * 2246822519 + parent * 3266489917)
                mixed = np.uint32((mixed ^ (mixed >> np.uint32(15))) * np.uint32(739982445))
                child = low + (np.int64(mixed >> np.uint32(8)) + turn) % size
                while stamp_E[child] == stamp:
                    child = (child + 1) % num_children
                stamp_E[child] = stamp
                weight = np.float32(weights_TLK[token, base, k]) / ((wanted - k + top_k - 1) // top_k)
                kept += weight
                place = i
                while place > 0 and weights_BLK[b, layer, place - 1] < weight:
                    weights_BLK[b, layer, place] = weights_BLK[b, layer, place - 1]
                    ids_BLK[b, layer, place] = ids_BLK[b, layer, place - 1]
                    place -= 1
                ids_BLK[b, layer, place], weights_BLK[b, layer, place] = child, weight
            if kept > 0:
                for i in range(wanted):
                    weights_BLK[b, layer, i] *= mass / kept
