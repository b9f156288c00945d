"""A prefix-summed pool: a trace is shuffled and counted once, then any window of its tokens is read as a difference.

Counting a step token by token costs its tokens; here it costs two rows per rank, however many tokens they span.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.layout import Placement
from moesim.routing.counting import Counts, Ints, SlotTables

MAX_WINDOW = 2**16 - 1
"""Tokens of one window; totals are kept modulo 2^16, which leaves the differences of such windows exact."""


@njit(cache=True)
def _accumulate(ids_TLK, slot_LXE, rank_P, total_TLC):  # type: ignore[no-untyped-def]
    """Row t + 1 is row t plus token t: a destination rank counts once a token, a slot once an assignment."""
    num_tokens, num_layers, top_k = ids_TLK.shape
    num_choices, num_ranks = slot_LXE.shape[1], rank_P[-1] + 1
    stamp_R = np.full(num_ranks, -1, np.int64)
    for t in range(num_tokens):
        for layer in range(num_layers):
            stamp = t * num_layers + layer
            total_C, before_C = total_TLC[t + 1, layer], total_TLC[t, layer]
            total_C[:] = before_C
            for k in range(top_k):
                slot = slot_LXE[layer, t % num_choices, ids_TLK[t, layer, k]]
                rank = rank_P[slot]
                total_C[num_ranks + slot] += np.uint16(1)
                total_C[rank] += np.uint16(stamp_R[rank] != stamp)
                stamp_R[rank] = stamp


@njit(cache=True)
def _read(total_TLC, first_R, last_R, node_R, ep, load_LP, traffic_CLR):  # type: ignore[no-untyped-def]
    """Add the window [first, last) of each source rank; a window may run past the end and start again.

    The inner loops run over whole slices without a branch, so that they become vector instructions.
    """
    num_tokens, num_layers = total_TLC.shape[0] - 1, total_TLC.shape[1]
    num_slots = total_TLC.shape[2] - ep
    window_C = np.empty(total_TLC.shape[2], np.uint16)
    for source in range(first_R.size):
        first, last, base = first_R[source], last_R[source], source // ep * ep
        own = source - base
        far_E = (node_R[base : base + ep] != node_R[source]).astype(np.int32)
        for layer in range(num_layers):
            low_C, high_C = total_TLC[first, layer], total_TLC[last - num_tokens * (last > num_tokens), layer]
            for c in range(window_C.size):
                window_C[c] = high_C[c] - low_C[c]
            if last > num_tokens:
                window_C += total_TLC[num_tokens, layer]
            window_C[own] = 0  # what stays on its rank does not travel
            sum_all, sum_far = np.int32(0), np.int32(0)
            near_E, beyond_E = traffic_CLR[2, layer, base : base + ep], traffic_CLR[3, layer, base : base + ep]
            for r in range(ep):
                tokens, far = np.int32(window_C[r]), np.int32(window_C[r]) * far_E[r]
                near_E[r] += tokens - far
                beyond_E[r] += far
                sum_all += tokens
                sum_far += far
            traffic_CLR[0, layer, source] += sum_all - sum_far
            traffic_CLR[1, layer, source] += sum_far
            load_P, slots_P = load_LP[layer, base // ep * num_slots :], window_C[ep:]
            for slot in range(num_slots):
                load_P[slot] += np.int32(slots_P[slot])


class RoutingPool:
    """Tokens of a trace in an order drawn once, with running totals per layer, destination rank and slot.

    Memory: 2 (T + 1) L (ep + P) bytes, for T tokens and a placement of P slots on ep ranks.

    Args:
        ids_TLK: the trace's expert ids.
        rows_T: rows of the trace in the order of the pool (a permutation, or a draw).
        placement: slots of one expert-parallel group; token t of the pool takes copy t mod n of an expert with n.
        num_experts: E.
        num_ranks: R expert ranks: groups of `placement.ep`.
        node_R: int32 [R], the node of each rank.
    """

    def __init__(
        self,
        ids_TLK: NDArray[np.unsignedinteger],
        rows_T: NDArray[np.int64],
        placement: Placement,
        num_experts: int,
        num_ranks: int,
        node_R: Ints,
    ) -> None:
        tables = SlotTables.of(placement, num_experts)
        self._ep, self._num_ranks, self._node_R = placement.ep, num_ranks, node_R
        self.num_layers, num_slots = placement.slot_expert_LP.shape
        self._num_slots = num_slots
        self.num_tokens = len(rows_T)
        self._total_TLC = np.zeros((self.num_tokens + 1, self.num_layers, placement.ep + num_slots), np.uint16)
        _accumulate(ids_TLK[rows_T], tables.slot_LXE, tables.rank_P, self._total_TLC)

    def count(self, first_R: NDArray[np.int64], tokens_R: NDArray[np.int64]) -> Counts:
        """Counts of a step in which rank r sends the `tokens_R[r]` tokens of the pool from `first_R[r]` on.

        A window that reaches the end of the pool goes on at its start.

        Raises:
            ValueError: a window does not start in the pool, or is longer than the pool or `MAX_WINDOW`.
        """
        most = min(self.num_tokens, MAX_WINDOW)
        if not (
            first_R.min() >= 0 and first_R.max() < self.num_tokens and 0 <= tokens_R.min() <= tokens_R.max() <= most
        ):
            raise ValueError(
                f"windows must start in 0..{self.num_tokens - 1} and hold at most {most} tokens; "
                f"given starts {first_R.min()}..{first_R.max()}, tokens {tokens_R.min()}..{tokens_R.max()}; "
                "make the pool larger or the windows shorter"
            )
        groups = self._num_ranks // self._ep
        load_LP = np.zeros((self.num_layers, groups * self._num_slots), np.int32)
        traffic_CLR = np.zeros((4, self.num_layers, self._num_ranks), np.int32)
        _read(self._total_TLC, first_R, first_R + tokens_R, self._node_R, self._ep, load_LP, traffic_CLR)
        return Counts(load_LP.reshape(self.num_layers, self._num_ranks, -1), traffic_CLR)
