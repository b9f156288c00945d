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
def _accumulate(ids_TLK, rows_T, choice_T, slot_LXE, rank_P, every, kept_T, sent_LUE, slots_LUP):  # type: ignore[no-untyped-def]
    """Totals before each kept place: a destination rank counts once a token, a slot once an assignment."""
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
        row, choice = rows_T[t], choice_T[t] % num_choices
        for layer in range(num_layers):
            for k in range(top_k):
                slot = slot_LXE[layer, choice, ids_TLK[row, layer, k]]
                rank = rank_P[slot]
                slots_LP[layer, slot] += np.uint16(1)
                sent_LE[layer, rank] += np.uint16(every or stamp_LE[layer, rank] != t)
                stamp_LE[layer, rank] = t


@njit(cache=True)
def _read(sent_LUE, slots_LUP, row_T, source_W, first_W, tokens_W, most, far_RE, load_LGP, traffic_CLR):  # type: ignore[no-untyped-def]
    """Add the windows, each sent by a source rank.

    The inner loops run over whole rows of arrays that start at 0, so that they become vector instructions; views of
    arrays are made once a layer, since each costs as much as a row. False, and nothing added, where a window is none.
    """
    low_W, high_W = np.empty_like(first_W), np.empty_like(first_W)
    for w in range(source_W.size):
        first, tokens = first_W[w], tokens_W[w]
        if first < 0 or tokens < 0 or tokens > most or first + tokens >= row_T.size:
            return False
        low_W[w], high_W[w] = row_T[first], row_T[first + tokens]
        if low_W[w] < 0 or high_W[w] < 0:
            return False
    num_layers, ep, num_slots = sent_LUE.shape[0], sent_LUE.shape[2], slots_LUP.shape[2]
    window_E, window_P = np.empty(ep, np.uint16), np.empty(num_slots, np.uint16)
    received_E, beyond_E = np.empty(ep, np.int32), np.empty(ep, np.int32)
    for layer in range(num_layers):
        sent_UE, slots_UP = sent_LUE[layer], slots_LUP[layer]
        load_GP, traffic_CR = load_LGP[layer], traffic_CLR[:, layer]
        begin, chained = 0, 0  # windows of a group's ranks that follow each other: their loads are one difference
        received_E[:] = 0
        beyond_E[:] = 0
        for w in range(source_W.size):
            source, low, high = source_W[w], low_W[w], high_W[w]
            group, own = source // ep, source % ep
            for r in range(ep):
                window_E[r] = sent_UE[high, r] - sent_UE[low, r]
            window_E[own] = 0  # what stays on its rank does not travel
            sum_all, sum_far = np.int32(0), np.int32(0)
            for r in range(ep):
                tokens = np.int32(window_E[r])
                far = np.int32(tokens * far_RE[source, r])
                received_E[r] += tokens
                beyond_E[r] += far
                sum_all += tokens
                sum_far += far
            traffic_CR[0, source] += sum_all - sum_far
            traffic_CR[1, source] += sum_far
            is_last = w + 1 == source_W.size or source_W[w + 1] // ep != group
            chained += tokens_W[w]
            if is_last or low_W[w + 1] != high or chained + tokens_W[w + 1] > MAX_COUNT:
                first = low_W[begin]
                for p in range(num_slots):
                    window_P[p] = slots_UP[high, p] - slots_UP[first, p]
                for p in range(num_slots):
                    load_GP[group, p] += np.int32(window_P[p])
                begin, chained = w + 1, 0
            if is_last:
                for r in range(ep):
                    traffic_CR[2, group * ep + r] += received_E[r] - beyond_E[r]
                    traffic_CR[3, group * ep + r] += beyond_E[r]
                received_E[:] = 0
                beyond_E[:] = 0
    return True


class RoutingPool:
    """Tokens of a trace in a fixed order, with totals per layer, destination rank and slot at some places.

    Memory: 2 U L (ep + P) bytes, for U places and a placement of P slots on ep ranks (`bytes_of`).

    Args:
        ids_TLK: the trace's expert ids.
        rows_T: rows of the trace in the order of the pool, which may repeat.
        choice_T: number by which each token chooses among the copies of an expert, see `SlotTables`.
        placement: slots of one expert-parallel group.
        num_experts: E.
        num_ranks: R expert ranks: groups of `placement.ep`.
        node_R: int32 [R], the node of each rank.
        message: "rank" or "choice", see `moesim.routing.counting.MESSAGES`.
        places_U: places where windows may begin and end, increasing, 0 to len(rows_T).

    Raises:
        ValueError: messages are by node, which windows cannot count.
    """

    def __init__(
        self,
        ids_TLK: NDArray[np.unsignedinteger],
        rows_T: NDArray[np.int64],
        choice_T: NDArray[np.int64],
        placement: Placement,
        num_experts: int,
        num_ranks: int,
        node_R: Ints,
        message: str,
        places_U: NDArray[np.int64],
    ) -> None:
        if message not in ("rank", "choice"):
            raise ValueError(f"a pool counts messages by rank or by choice, given {message!r}; count token by token")
        tables = SlotTables.of(placement, num_experts)
        self._ep, self._num_ranks = placement.ep, num_ranks
        self.num_layers, self._num_slots = placement.slot_expert_LP.shape
        self._most = self.most_tokens(message, ids_TLK.shape[2])
        self._row_T = np.full(len(rows_T) + 1, -1, np.int64)
        self._row_T[places_U] = np.arange(len(places_U))
        self._sent_LUE = np.empty((self.num_layers, len(places_U), placement.ep), np.uint16)
        self._slots_LUP = np.empty((self.num_layers, len(places_U), self._num_slots), np.uint16)
        _accumulate(
            ids_TLK, rows_T, choice_T, tables.slot_LXE, tables.rank_P, message == "choice", self._row_T,
            self._sent_LUE, self._slots_LUP,
        )  # fmt: skip
        base_R = np.arange(num_ranks) // placement.ep * placement.ep
        node_RE = node_R[base_R[:, None] + np.arange(placement.ep)]
        self._far_RE = (node_RE != node_R[:, None]).astype(np.int32)

    @staticmethod
    def bytes_of(num_places: int, num_layers: int, num_slots: int, ep: int) -> int:
        """Memory of the totals."""
        return 2 * num_places * num_layers * (ep + num_slots)

    @staticmethod
    def most_tokens(message: str, top_k: int) -> int:
        """Most tokens of a window whose counts totals can tell."""
        return MAX_COUNT // (top_k if message == "choice" else 1)

    def count(
        self, source_W: NDArray[np.int64], first_W: NDArray[np.int64], tokens_W: NDArray[np.int64]
    ) -> Counts:  # fmt: skip
        """Counts of a step: window w is the `tokens_W[w]` tokens of the pool from `first_W[w]` on, sent by a rank.

        Args:
            source_W: source ranks; those of one group side by side.

        Raises:
            ValueError: a window does not lie in the pool, holds more than totals can tell, or begins or ends at a place
                that was not kept.
        """
        load_LGP = np.zeros((self.num_layers, self._num_ranks // self._ep, self._num_slots), np.int32)
        traffic_CLR = np.zeros((4, self.num_layers, self._num_ranks), np.int32)
        if not _read(
            self._sent_LUE, self._slots_LUP, self._row_T, source_W, first_W, tokens_W, self._most, self._far_RE,
            load_LGP, traffic_CLR,
        ):  # fmt: skip
            raise ValueError(
                f"windows must lie in 0..{len(self._row_T) - 1}, hold 0..{self._most} tokens, begin and end at "
                f"places_U; given places {first_W.min()}..{(first_W + tokens_W).max()}, tokens {tokens_W.min()}.."
                f"{tokens_W.max()}"
            )
        return Counts(load_LGP.reshape(self.num_layers, self._num_ranks, -1), traffic_CLR)
