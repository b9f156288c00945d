"""Compiled counting over routing: how many tokens each expert slot gets and each rank sends and receives.

One pass over the tokens of an iteration, all layers. A token that picks several experts of one rank travels there
once, unless every choice is a message: a stamp per (layer, rank) remembers the last token sent there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.layout import Placement

Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Counts:
    """Tokens of one iteration.

    load_LRS: int32 [L, R, S], tokens in each of the S slots of each rank (R expert ranks).
    traffic_CLR: int32 [4, L, R]: messages sent inside the node, sent to other nodes, received inside, received from
        other nodes, of one token each (see `MESSAGES`); own tokens not counted. Combine is the reverse.
    source_B, target_LBK: where asked for, the rank of each token and of each of its choices.
    """

    load_LRS: Ints
    traffic_CLR: Ints
    source_B: Ints | None = None
    target_LBK: NDArray[np.int64] | None = None


@njit(cache=True)
def _sum_slots(load_NS, sum_N):  # type: ignore[no-untyped-def]
    for n in range(load_NS.shape[0]):
        for s in range(load_NS.shape[1]):
            sum_N[n] += load_NS[n, s]


def summed_slots(load_LRS: NDArray[np.int32]) -> NDArray[np.int64]:
    """Tokens of all slots of each rank, [L, R]; several times as fast as a sum along so short an axis."""
    sum_LR = np.zeros(load_LRS.shape[:-1], np.int64)
    _sum_slots(np.ascontiguousarray(load_LRS).reshape(-1, load_LRS.shape[-1]), sum_LR.reshape(-1))
    return sum_LR


MESSAGES = ("rank", "choice", "node")
"""What a message is: a token for each rank that it needs; for each of its choices; or for each node that it needs, to
the rank of its own index there, which passes it on to the ranks that need it."""
_BLOCK = 256  # tokens whose ids stay in cache while one layer's tables are at hand
_RANK_SHIFT = 32


@njit(cache=True)
def _count(  # type: ignore[no-untyped-def]
    ids_TLK, rows_B, source_B, choice_B, order_B, base_R, place_LXE, slots_per_rank, load_LP, sent_LRR, stamp_LR, every
):
    """Count, block by block: the rows of a block are copied together first, so that they stream from memory once.

    Tokens are taken in `order_B`, by source, so that what a source has sent stays in the first level of the cache;
    `place_LXE` is the slot of an expert and, above `_RANK_SHIFT` bits, its rank, so that both are one look-up. The
    inner loop has no branch that depends on the data, since mispredicted ones would cost more than the counting,
    makes no array views, each of which costs an atomic count of references, and indexes with unsigned numbers, which
    need no check for wrapping around.
    """
    num_layers, top_k, num_choices = ids_TLK.shape[1], ids_TLK.shape[2], place_LXE.shape[1]
    shift = np.uint64(_RANK_SHIFT)
    slot_bits = (np.uint64(1) << shift) - np.uint64(1)
    block_BLK = np.empty((_BLOCK, num_layers, top_k), ids_TLK.dtype)
    for first in range(0, rows_B.size, _BLOCK):
        size = min(_BLOCK, rows_B.size - first)
        for i in range(size):
            block_BLK[i] = ids_TLK[rows_B[order_B[first + i]]]
        for layer in range(num_layers):
            place_XE, load_P, stamp_R, sent_RR = place_LXE[layer], load_LP[layer], stamp_LR[layer], sent_LRR[layer]
            for i in range(size):
                token = order_B[first + i]
                source, stamp, choice = source_B[token], np.int32(token), choice_B[token] % num_choices
                base, base_slot = np.uint64(base_R[source]), np.uint64(base_R[source] * slots_per_rank)
                for k in range(top_k):
                    place = place_XE[choice, block_BLK[i, layer, k]]
                    rank = base + (place >> shift)
                    load_P[base_slot + (place & slot_bits)] += 1
                    sent_RR[source, rank] += np.int32(stamp_R[rank] != stamp) | every
                    stamp_R[rank] = stamp


@njit(cache=True)
def _count_nodes(ids_TLK, rows_B, source_B, choice_B, base_R, place_LXE, node_R, sent_LRN):  # type: ignore[no-untyped-def]
    """Tokens of each rank with at least one choice in each node."""
    num_layers, top_k, num_choices = ids_TLK.shape[1], ids_TLK.shape[2], place_LXE.shape[1]
    stamp_N = np.full(sent_LRN.shape[2], -1, np.int64)
    for layer in range(num_layers):
        for token in range(rows_B.size):
            source, stamp = source_B[token], layer * rows_B.size + token
            for k in range(top_k):
                place = place_LXE[layer, choice_B[token] % num_choices, ids_TLK[rows_B[token], layer, k]]
                node = node_R[base_R[source] + np.int64(place >> np.uint64(_RANK_SHIFT))]
                sent_LRN[layer, source, node] += np.int32(stamp_N[node] != stamp)
                stamp_N[node] = stamp


@njit(cache=True)
def _sum_relayed(sent_LRR, sent_LRN, node_R, traffic_CLR):  # type: ignore[no-untyped-def]
    """Messages of tokens that go once to each other node, to the rank of their own index, and on to those they need."""
    num_layers, num_ranks, num_nodes = sent_LRN.shape
    per_node = num_ranks // num_nodes
    for layer in range(num_layers):
        for source in range(num_ranks):
            for rank in range(num_ranks):
                relay = node_R[rank] * per_node + source % per_node
                tokens = sent_LRR[layer, source, rank] * np.int32(rank != relay)
                traffic_CLR[0, layer, relay] += tokens
                traffic_CLR[2, layer, rank] += tokens
            for node in range(num_nodes):
                if node != node_R[source]:
                    traffic_CLR[1, layer, source] += sent_LRN[layer, source, node]
                    traffic_CLR[3, layer, node * per_node + source % per_node] += sent_LRN[layer, source, node]


@njit(cache=True)
def _sum_traffic(sent_LRR, node_R, traffic_CLR):  # type: ignore[no-untyped-def]
    """Tokens sent and received by each rank, inside its node and beyond; what stays on a rank is left out."""
    num_layers, num_ranks = sent_LRR.shape[0], sent_LRR.shape[1]
    for layer in range(num_layers):
        for source in range(num_ranks):
            for rank in range(num_ranks):
                tokens = sent_LRR[layer, source, rank] * np.int32(rank != source)
                far = tokens * np.int32(node_R[rank] != node_R[source])
                traffic_CLR[0, layer, source] += tokens - far
                traffic_CLR[1, layer, source] += far
                traffic_CLR[2, layer, rank] += tokens - far
                traffic_CLR[3, layer, rank] += far


@dataclass(frozen=True, eq=False)
class SlotTables:
    """Where the tokens of an expert go, for tokens that differ in a choice number c.

    slot_LXE: int32 [L, X, E], the slot for an expert where c mod X is x; copies of an expert are taken in turn.
    rank_P: int32 [P], the rank of each slot inside its expert-parallel group.
    """

    slot_LXE: Ints
    rank_P: Ints

    @classmethod
    def of(cls, placement: Placement, num_experts: int) -> SlotTables:
        """The tables of a placement."""
        slots_LEX, num_replicas_LE = placement.replicas(num_experts)
        # An expert with n copies takes copy c mod n: one table per value of c mod (least common multiple of all n).
        choice_X = np.arange(np.lcm.reduce(np.unique(num_replicas_LE)))[None, :, None]
        slot_LXE = np.take_along_axis(slots_LEX.swapaxes(1, 2), choice_X % num_replicas_LE[:, None, :], axis=1)
        num_slots = placement.slot_expert_LP.shape[1]
        rank_P = np.arange(num_slots) // (num_slots // placement.ep)
        return cls(np.ascontiguousarray(slot_LXE.astype(np.int32)), rank_P.astype(np.int32))


class Counter:
    """Counts iterations of one layout; holds what stays the same between them.

    Args:
        placement: slots of one expert-parallel group.
        num_experts: E.
        num_ranks: R expert ranks: groups of `placement.ep`.
        node_R: int32 [R], the node of each rank; where messages are "node", all nodes are full and in order.
        message: one of `MESSAGES`.
    """

    def __init__(
        self, placement: Placement, num_experts: int, num_ranks: int, node_R: Ints, message: str = "rank"
    ) -> None:
        self._message = message
        tables = SlotTables.of(placement, num_experts)
        rank_LXE = tables.rank_P[tables.slot_LXE].astype(np.uint64)
        self.place_LXE = tables.slot_LXE.astype(np.uint64) | rank_LXE << np.uint64(_RANK_SHIFT)
        self.num_layers, num_slots = placement.slot_expert_LP.shape
        self._slots_per_rank = num_slots // placement.ep
        self.base_R = (np.arange(num_ranks) // placement.ep * placement.ep).astype(np.int32)
        self._node_R = node_R
        self.num_ranks = num_ranks
        self._sent_LRR = np.zeros((self.num_layers, num_ranks, num_ranks), np.int32)  # scratch, kept to save its set-up

    def count(
        self,
        ids_TLK: NDArray[np.unsignedinteger],
        rows_B: NDArray[np.int64],
        source_B: Ints,
        choice_B: NDArray[np.int64] | None = None,
    ) -> Counts:
        """Count one iteration.

        Args:
            ids_TLK: the trace's expert ids.
            rows_B: rows of the trace, one for each token of the iteration.
            source_B: expert rank that each token starts from.
            choice_B: number by which each token chooses among copies, see `SlotTables`; its index if None.
        """
        choice_B = np.arange(len(rows_B)) if choice_B is None else choice_B
        shape = (self.num_layers, self.num_ranks)
        load_LP = np.zeros((shape[0], shape[1] * self._slots_per_rank), np.int32)
        traffic_CLR = np.zeros((4, *shape), np.int32)
        stamp_LR = np.full(shape, -1, np.int32)
        self._sent_LRR[:] = 0
        _count(
            ids_TLK, rows_B, source_B, choice_B, np.argsort(source_B, kind="stable"), self.base_R, self.place_LXE,
            self._slots_per_rank, load_LP, self._sent_LRR, stamp_LR, np.int32(self._message == "choice"),
        )  # fmt: skip
        if self._message == "node":
            sent_LRN = np.zeros((*shape, int(self._node_R.max()) + 1), np.int32)
            _count_nodes(ids_TLK, rows_B, source_B, choice_B, self.base_R, self.place_LXE, self._node_R, sent_LRN)
            _sum_relayed(self._sent_LRR, sent_LRN, self._node_R, traffic_CLR)
        else:
            _sum_traffic(self._sent_LRR, self._node_R, traffic_CLR)
        return Counts(load_LP.reshape(*shape, self._slots_per_rank), traffic_CLR)

    def with_targets(
        self,
        counts: Counts,
        ids_TLK: NDArray[np.unsignedinteger],
        rows_B: NDArray[np.int64],
        source_B: Ints,
        choice_B: NDArray[np.int64] | None = None,
    ) -> Counts:
        """The counts of an iteration together with the rank of each token's choices."""
        choice_B = (np.arange(len(rows_B)) if choice_B is None else choice_B) % self.place_LXE.shape[1]
        ids_LBK = ids_TLK[rows_B].swapaxes(0, 1)
        layer_L = np.arange(self.num_layers)[:, None, None]
        rank_LBK = (self.place_LXE[layer_L, choice_B[:, None], ids_LBK] >> np.uint64(_RANK_SHIFT)).astype(np.int64)
        return replace(counts, source_B=source_B, target_LBK=rank_LBK + self.base_R[source_B][:, None])
