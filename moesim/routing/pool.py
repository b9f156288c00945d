"""A prefix-summed pool: tokens in a fixed order are counted once, then any window of them is read as a difference.

Counting a step token by token costs its tokens; here it costs a row of totals for each rank and layer, however many
tokens its window holds. Where the windows of a group's ranks follow each other, the loads of all slots are one
difference for the whole group.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.layout import Placement
from moesim.routing.counting import Counts, Ints, SlotTables

MAX_COUNT = 2**16 - 1
"""Most that one window may count; totals are kept modulo 2^16, which leaves the differences of such windows exact."""


@njit(cache=True)
def _accumulate(ids_TLK, rows_T, slot_LXE, rank_P, every, kept_T, sent_LUE, slots_LUP):  # type: ignore[no-untyped-def]
    """Totals of the tokens before each kept place: a destination rank counts once a token, a slot once an assignment."""
    num_layers, num_choices, top_k = slot_LXE.shape[0], slot_LXE.shape[1], ids_TLK.shape[2]
    sent_LE = np.zeros((num_layers, sent_LUE.shape[2]), np.uint16)
    slots_LP = np.zeros((num_layers, rank_P.size), np.uint16)
    stamp_LE = np.full(sent_LE.shape, -1, np.int32)
    for t in range(rows_T.size + 1):
        if kept_T[t] >= 0:
            sent_LUE[:, kept_T[t]] = sent_LE
            slots_LUP[:, kept_T[t]] = slots_LP
        if t == rows_T.size:
            break
        row, choice = rows_T[t], t % num_choices
        for layer in range(num_layers):
            for k in range(top_k):
                slot = slot_LXE[layer, choice, ids_TLK[row, layer, k]]
                rank = rank_P[slot]
                slots_LP[layer, slot] += np.uint16(1)
                sent_LE[layer, rank] += np.uint16(every or stamp_LE[layer, rank] != t)
                stamp_LE[layer, rank] = t


@njit(cache=True)
def _read(sent_LUE, slots_LUP, first_R, last_R, wraps_R, whole, far_RE, is_chained_G, load_LGP, traffic_CLR):  # type: ignore[no-untyped-def]
    """Add the window from row `first` to row `last` of each source rank, and `wraps` times the `whole` pool.

    The inner loops run over whole rows of arrays that start at 0, so that they become vector instructions; views of
    arrays are made once a layer, since each costs as much as a row.
    """
    num_layers, ep, num_slots = sent_LUE.shape[0], sent_LUE.shape[2], slots_LUP.shape[2]
    window_E, window_P = np.empty(ep, np.uint16), np.empty(num_slots, np.uint16)
    near_E, beyond_E = np.empty(ep, np.int32), np.empty(ep, np.int32)
    for layer in range(num_layers):
        sent_UE, slots_UP, load_GP, traffic_CR = (
            sent_LUE[layer],
            slots_LUP[layer],
            load_LGP[layer],
            traffic_CLR[:, layer],
        )
        for group in range(first_R.size // ep):
            base = group * ep
            near_E[:] = 0
            beyond_E[:] = 0
            for own in range(ep):
                source = base + own
                low, high, turns = first_R[source], last_R[source], np.uint16(wraps_R[source])
                for r in range(ep):
                    window_E[r] = sent_UE[high, r] - sent_UE[low, r]
                if turns:
                    for r in range(ep):
                        window_E[r] += sent_UE[whole, r]
                window_E[own] = 0  # what stays on its rank does not travel
                sum_all, sum_far = np.int32(0), np.int32(0)
                for r in range(ep):
                    tokens = np.int32(window_E[r])
                    far = np.int32(tokens * far_RE[source, r])
                    near_E[r] += tokens - far
                    beyond_E[r] += far
                    sum_all += tokens
                    sum_far += far
                traffic_CR[0, source] = sum_all - sum_far
                traffic_CR[1, source] = sum_far
            for r in range(ep):
                traffic_CR[2, base + r] = near_E[r]
                traffic_CR[3, base + r] = beyond_E[r]
            for own in range(1 if is_chained_G[group] else ep):
                last = base + (ep - 1 if is_chained_G[group] else own)
                low, high, turns = first_R[base + own], last_R[last], np.uint16(wraps_R[base + own : last + 1].sum())
                for p in range(num_slots):
                    window_P[p] = slots_UP[high, p] - slots_UP[low, p] + turns * slots_UP[whole, p]
                for p in range(num_slots):
                    load_GP[group, p] += np.int32(window_P[p])


class RoutingPool:
    """Tokens of a trace in a fixed order, with totals per layer, destination rank and slot at some places.

    Memory: 2 (U + 2) L (ep + P) bytes, for U places and a placement of P slots on ep ranks (`bytes_of`).

    Args:
        ids_TLK: the trace's expert ids.
        rows_T: rows of the trace in the order of the pool, which may repeat.
        placement: slots of one expert-parallel group; token t of the pool takes copy t mod n of an expert with n.
        num_experts: E.
        num_ranks: R expert ranks: groups of `placement.ep`.
        node_R: int32 [R], the node of each rank.
        message: "rank" or "choice", see `moesim.routing.counting.MESSAGES`.
        places_U: places where windows may begin and end, 0 to len(rows_T); all if None.
    """

    def __init__(
        self,
        ids_TLK: NDArray[np.unsignedinteger],
        rows_T: NDArray[np.int64],
        placement: Placement,
        num_experts: int,
        num_ranks: int,
        node_R: Ints,
        message: str = "rank",
        places_U: NDArray[np.int64] | None = None,
    ) -> None:
        if message not in ("rank", "choice"):
            raise ValueError(f"a pool counts messages by rank or by choice, given {message!r}; count token by token")
        tables = SlotTables.of(placement, num_experts)
        self._ep, self._num_ranks = placement.ep, num_ranks
        self.num_layers, self._num_slots = placement.slot_expert_LP.shape
        self.num_tokens = len(rows_T)
        self._most = self.most_tokens(message, ids_TLK.shape[2])
        kept = np.arange(self.num_tokens + 1) if places_U is None else np.union1d(places_U, [0, self.num_tokens])
        self._row_T = np.full(self.num_tokens + 1, -1, np.int64)
        self._row_T[kept] = np.arange(len(kept))
        self._sent_LUE = np.empty((self.num_layers, len(kept), placement.ep), np.uint16)
        self._slots_LUP = np.empty((self.num_layers, len(kept), self._num_slots), np.uint16)
        _accumulate(
            ids_TLK, rows_T, tables.slot_LXE, tables.rank_P, message == "choice", self._row_T, self._sent_LUE,
            self._slots_LUP,
        )  # fmt: skip
        base_R = np.arange(num_ranks) // placement.ep * placement.ep
        node_RE = node_R[base_R[:, None] + np.arange(placement.ep)]
        self._far_RE = (node_RE != node_R[:, None]).astype(np.int32)

    @staticmethod
    def bytes_of(num_places: int, num_layers: int, num_slots: int, ep: int) -> int:
        """Memory of the totals."""
        return 2 * (num_places + 2) * num_layers * (ep + num_slots)

    @staticmethod
    def most_tokens(message: str, top_k: int) -> int:
        """Tokens of the longest window whose counts totals can tell."""
        return MAX_COUNT // (top_k if message == "choice" else 1)

    def count(self, first_R: NDArray[np.int64], tokens_R: NDArray[np.int64]) -> Counts:
        """Counts of a step in which rank r sends the `tokens_R[r]` tokens of the pool from `first_R[r]` on.

        A window that reaches the end of the pool goes on at its start.

        Raises:
            ValueError: a window does not start in the pool, is longer than the pool or than totals can tell, or begins
                or ends at a place that was not kept.
        """
        most = min(self.num_tokens, self._most)
        if not (
            first_R.min() >= 0 and first_R.max() < self.num_tokens and 0 <= tokens_R.min() <= tokens_R.max() <= most
        ):
            raise ValueError(
                f"windows must start in 0..{self.num_tokens - 1} and hold at most {most} tokens; "
                f"given starts {first_R.min()}..{first_R.max()}, tokens {tokens_R.min()}..{tokens_R.max()}; "
                "make the pool larger or the windows shorter"
            )
        last_R = first_R + tokens_R
        wraps_R = (last_R >= self.num_tokens).astype(np.int64)
        last_R = last_R - wraps_R * self.num_tokens
        rows_R, ends_R = self._row_T[first_R], self._row_T[last_R]
        if min(rows_R.min(), ends_R.min()) < 0:
            raise ValueError("a window begins or ends where the pool kept no totals; name the place in places_U")
        groups = self._num_ranks // self._ep
        load_LGP = np.zeros((self.num_layers, groups, self._num_slots), np.int32)
        traffic_CLR = np.empty((4, self.num_layers, self._num_ranks), np.int32)
        _read(
            self._sent_LUE, self._slots_LUP, rows_R, ends_R, wraps_R, self._row_T[-1], self._far_RE,
            self._is_chained_G(first_R, last_R, tokens_R), load_LGP, traffic_CLR,
        )  # fmt: skip
        return Counts(load_LGP.reshape(self.num_layers, self._num_ranks, -1), traffic_CLR)

    def _is_chained_G(
        self, first_R: NDArray[np.int64], last_R: NDArray[np.int64], tokens_R: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Whether the windows of a group's ranks follow each other, and totals can tell their sum."""
        first_GE, last_GE, tokens_GE = (array.reshape(-1, self._ep) for array in (first_R, last_R, tokens_R))
        gap_GE = (first_GE[:, 1:] - last_GE[:, :-1]) % self.num_tokens
        follows_G = (gap_GE == 0).all(axis=1)
        return np.asarray(follows_G & (tokens_GE.sum(axis=1) <= MAX_COUNT))
