"""Collectives: who sends how much to whom, in rounds? Decision: a `Schedule` for ranks 0 to R - 1, node after node.

All-to-alls further say, as class attributes: `message`, what they send one of (see `routing.counting.MESSAGES`; None
where only their schedule tells); `reached`, the share of a link's rate that they reach inside a node and beyond (None:
the device's efficiency); `sm_fraction`, the share of the device's cores that they keep from computing beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.hardware import Efficiency
from moesim.network.sends import Schedule, Sends

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Ranks:
    """Who takes part: R ranks, `per_node` of them in each node.

    Raises:
        ValueError: there are none, or the last node is not full.
    """

    num_ranks: int
    per_node: int

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.per_node < 1:
            raise ValueError(
                f"a collective needs 1 rank or more, given {self.num_ranks} on nodes of {self.per_node}: the group is "
                "empty"
            )
        if self.num_ranks > self.per_node and self.num_ranks % self.per_node:
            raise ValueError(f"{self.num_ranks} ranks do not fill nodes of {self.per_node}; give a multiple")

    @property
    def num_nodes(self) -> int:
        """N."""
        return max(1, self.num_ranks // self.per_node)

    @property
    def local(self) -> int:
        """Ranks that take part in each node."""
        return min(self.num_ranks, self.per_node)

    @property
    def node_R(self) -> Ints:
        """The node of each rank."""
        return np.arange(self.num_ranks) // self.per_node


@njit(cache=True)
def _count(source_B, target_BK, node_R, choices_RR, tokens_RR, tokens_RN):  # type: ignore[no-untyped-def]
    """Choices, and tokens once for each rank and once for each node: a stamp remembers the last token sent there."""
    stamp_R, stamp_N = np.full(choices_RR.shape[1], -1), np.full(tokens_RN.shape[1], -1)
    for token in range(source_B.size):
        source = source_B[token]
        for k in range(target_BK.shape[1]):
            rank = target_BK[token, k]
            node = node_R[rank]
            choices_RR[source, rank] += 1.0
            tokens_RR[source, rank] += np.float64(stamp_R[rank] != token)
            tokens_RN[source, node] += np.float64(stamp_N[node] != token)
            stamp_R[rank] = token
            stamp_N[node] = token


@dataclass(frozen=True, eq=False)
class TokenTraffic:
    """Where the tokens of one layer go.

    Attributes:
        choices_RR: choices of tokens of each source rank (row) that fall on each rank: a token counts once a choice.
        tokens_RR: tokens with at least one choice on the rank.
        tokens_RN: tokens with at least one choice in the node.
        tokens_R: tokens of each source rank.
        token_bytes: of one token's row.
    """

    ranks: Ranks
    tokens_R: Floats
    choices_RR: Floats
    tokens_RR: Floats
    tokens_RN: Floats
    token_bytes: float

    @classmethod
    def of(cls, ranks: Ranks, source_B: Ints, target_BK: Ints, token_bytes: float) -> TokenTraffic:
        """Count tokens.

        Args:
            source_B: rank of each token.
            target_BK: rank of each of its choices.
        """
        R, N = ranks.num_ranks, ranks.num_nodes
        choices_RR, tokens_RR, tokens_RN = np.zeros((R, R)), np.zeros((R, R)), np.zeros((R, N))
        _count(source_B, target_BK, ranks.node_R, choices_RR, tokens_RR, tokens_RN)
        tokens_R = np.bincount(source_B, minlength=R).astype(np.float64)
        return cls(ranks, tokens_R, choices_RR, tokens_RR, tokens_RN, token_bytes)

    @classmethod
    def even(cls, ranks: Ranks, rank_bytes: float) -> TokenTraffic:
        """Top-1 routing in equal shares: every rank has `rank_bytes`, an R-th of them for each rank."""
        R, N = ranks.num_ranks, ranks.num_nodes
        share_RR = np.full((R, R), 1 / R)
        return cls(ranks, np.ones(R), share_RR, share_RR, np.full((R, N), 1 / N), rank_bytes)

    @property
    def bytes_RR(self) -> Floats:
        """Bytes that each rank has for each, a token once for each rank."""
        return self.tokens_RR * self.token_bytes


Reached = tuple[Efficiency, Efficiency]
_DEEPEP = "fitted: DeepEP's published times on H800"


class AllToAll(Protocol):
    """What every all-to-all has; see above."""

    message: ClassVar[str | None]
    reached: ClassVar[Reached | None]
    sm_fraction: ClassVar[float]

    def dispatch(self, traffic: TokenTraffic) -> Schedule:
        """Rounds of sends."""
        ...


@dataclass(frozen=True)
class Flat:
    """Every rank sends to every other at once, a token once to each rank that it needs.

    Source: NCCL's grouped send and receive.
    """

    message: ClassVar[str | None] = "rank"
    reached: ClassVar[Reached | None] = None
    sm_fraction: ClassVar[float] = 0.0

    def dispatch(self, traffic: TokenTraffic) -> Schedule:
        """One round."""
        return [Sends.of_matrix(traffic.bytes_RR)]


@dataclass(frozen=True)
class LowLatency:
    """Every choice of a token is a message of its own, written straight into the receiver's memory.

    No core is held while messages are on their way. What it reaches is the mean and the range of dispatch and combine
    as `moesim validate network --deepep` fits them: 86 and 113 GB/s of 200, 36.8 and 38.8 of 50.

    Source: DeepEP's low-latency kernels (github.com/deepseek-ai/DeepEP); CloudMatrix-Infer's fused dispatch
        (arXiv 2506.12708) sends so over its bus.
    """

    message: ClassVar[str | None] = "choice"
    reached: ClassVar[Reached | None] = (
        Efficiency(0.50, 0.43, 0.57, "fitted", _DEEPEP),
        Efficiency(0.76, 0.73, 0.78, "fitted", _DEEPEP),
    )
    sm_fraction: ClassVar[float] = 0.0

    def dispatch(self, traffic: TokenTraffic) -> Schedule:
        """One round."""
        return [Sends.of_matrix(traffic.choices_RR * traffic.token_bytes)]


@dataclass(frozen=True)
class Leaders:
    """1DH: a node's ranks hand all to its first rank, first ranks exchange, and hand out: few, large messages.

    Source: HetuMoE (arXiv 2203.14685), for nodes with one NIC.
    """

    message: ClassVar[str | None] = None
    reached: ClassVar[Reached | None] = None
    sm_fraction: ClassVar[float] = 0.0

    def dispatch(self, traffic: TokenTraffic) -> Schedule:
        """Gather, exchange, scatter."""
        ranks, N = traffic.ranks, traffic.ranks.num_nodes
        lead_R = ranks.node_R * ranks.per_node
        own = np.arange(ranks.num_ranks)
        bytes_RR = traffic.bytes_RR * (own[:, None] != own)
        bytes_NN = bytes_RR.reshape(N, ranks.local, N, ranks.local).sum(axis=(1, 3))
        leads = np.arange(N) * ranks.per_node
        return [
            Sends.of(own, lead_R, bytes_RR.sum(axis=1)),
            Sends.of(leads[:, None], leads, bytes_NN),
            Sends.of(lead_R, own, bytes_RR.sum(axis=0)),
        ]


@dataclass(frozen=True)
class TwoLevel:
    """2DH: inside the node to the rank with the receiver's index, then between ranks of equal index.

    Source: Tutel (arXiv 2206.03382); DeepSpeed-MoE's hierarchical all-to-all (arXiv 2201.05596).
    """

    message: ClassVar[str | None] = None
    reached: ClassVar[Reached | None] = None
    sm_fraction: ClassVar[float] = 0.0

    def dispatch(self, traffic: TokenTraffic) -> Schedule:
        """Two rounds."""
        ranks = traffic.ranks
        N, M = ranks.num_nodes, ranks.local
        bytes_NMNM = traffic.bytes_RR.reshape(N, M, N, M)  # source node, its rank, target node, its rank
        n, a, b = np.ogrid[:N, :M, :M]
        inside = Sends.of(n * ranks.per_node + a, n * ranks.per_node + b, bytes_NMNM.sum(axis=2))
        i, j, b = np.ogrid[:N, :N, :M]
        return [inside, Sends.of(i * ranks.per_node + b, j * ranks.per_node + b, bytes_NMNM.sum(axis=1))]


@dataclass(frozen=True)
class Rails:
    """A token goes once to each other node, to the rank of its own index, and from there to the ranks that it needs.

    Source: DeepEP's normal kernels (github.com/deepseek-ai/DeepEP), which run both rounds at once, chunk by chunk;
        SMILE's bi-level all-to-all (arXiv 2212.05191), one after the other. What it reaches: DeepEP's published rates
        of 4,096 tokens a rank on H800, 153 and 158 GB/s of 200 inside a node; 57 and 58 between nodes at EP32, a
        quarter of which stays in the node: 43 of 50. Its kernels hold 24 of 132 cores (DeepSeek's published profiles).
    """

    message: ClassVar[str | None] = "node"
    reached: ClassVar[Reached | None] = (
        Efficiency(0.78, 0.76, 0.79, "fitted", _DEEPEP),
        Efficiency(0.86, 0.80, 0.90, "fitted", _DEEPEP),
    )
    sm_fraction: ClassVar[float] = 24 / 132
    is_pipelined: bool = True

    def dispatch(self, traffic: TokenTraffic) -> Schedule:
        """Between nodes, then inside them."""
        ranks = traffic.ranks
        N, M = ranks.num_nodes, ranks.local
        source = np.arange(ranks.num_ranks)
        relay_RN = np.arange(N) * ranks.per_node + source[:, None] % ranks.per_node
        between = Sends.of(source[:, None], relay_RN, traffic.tokens_RN * traffic.token_bytes)
        bytes_NMNM = traffic.bytes_RR.reshape(N, M, N, M)
        j, a, b = np.ogrid[:N, :M, :M]
        inside = Sends.of(j * ranks.per_node + a, j * ranks.per_node + b, bytes_NMNM.sum(axis=0).swapaxes(0, 1))
        return [between, inside]


@dataclass(frozen=True)
class Coordinated:
    """Tokens are the same on all ranks of a tensor-parallel group: each sends only to ranks of its own index there.

    Source: DeepSpeed-MoE's parallelism-coordinated all-to-all (arXiv 2201.05596, section 5.3).
    """

    tp: int

    def dispatch(self, traffic: TokenTraffic) -> Schedule:
        """One round; `traffic` has each token on any one rank of its group."""
        R, tp = traffic.ranks.num_ranks, self.tp
        if R % tp:
            raise ValueError(f"tensor parallelism of {tp} does not divide {R} ranks; give a divisor")
        target = np.arange(R)
        bytes_GR = traffic.bytes_RR.reshape(R // tp, tp, R).sum(axis=1)
        return [Sends.of(np.arange(R // tp)[:, None] * tp + target % tp, target, bytes_GR)]


@dataclass(frozen=True)
class GatherAll:
    """Every rank gets all tokens and picks its own; results come back by a reduce-scatter.

    Source: Megatron-LM's all-gather dispatcher; MegaScale-MoE (arXiv 2505.11432) for large top-k.
    """

    message: ClassVar[str | None] = None
    reached: ClassVar[Reached | None] = None
    sm_fraction: ClassVar[float] = 0.0

    def dispatch(self, traffic: TokenTraffic) -> Schedule:
        """One round."""
        R, held_R = traffic.ranks.num_ranks, traffic.tokens_R * traffic.token_bytes
        return [Sends.of(np.arange(R)[:, None], np.arange(R), held_R[:, None])]


def reverse(schedule: Schedule) -> Schedule:
    """The way back: combine after dispatch, or a reduce-scatter from an all-gather."""
    return [Sends(sends.target_F, sends.source_F, sends.bytes_F) for sends in reversed(schedule)]


@dataclass(frozen=True)
class Ring:
    """Each rank passes a share on to the next, R - 1 times to add up and R - 1 times to hand round.

    Source: Patarasuk, Yuan, JPDC 2009; NCCL's ring, whose channels start at other ranks of a node each, so that all of
        its NICs are used.
    """

    def all_gather(self, ranks: Ranks, num_bytes: float) -> Schedule:
        """R - 1 rounds of a share of `num_bytes`, the whole buffer."""
        R, M = ranks.num_ranks, ranks.local
        channel, place = np.ogrid[:M, :R]
        order_CR = place // M * ranks.per_node + (place + channel) % M
        return [Sends.of(order_CR, np.roll(order_CR, -1, axis=1), num_bytes / R / M)] * (R - 1)

    def all_reduce(self, ranks: Ranks, num_bytes: float) -> Schedule:
        """2 (R - 1) rounds."""
        gather = self.all_gather(ranks, num_bytes)
        return [*gather, *gather]


@dataclass(frozen=True)
class Tree:
    """Two binary trees, each adding up one half of the buffer to its root and handing it down, chunk by chunk.

    A rank is a leaf of at least one of the two, so that both directions of its link are used.

    Source: Sanders, Speck, Traeff, Parallel Computing 2009; NCCL 2.4's double binary trees.
    """

    num_chunks: int = 8

    def all_reduce(self, ranks: Ranks, num_bytes: float) -> Schedule:
        """2 (depth + chunks - 1) rounds."""
        R = ranks.num_ranks
        parent_R, depth_R = _tree(R)
        other_R = R - 1 - np.arange(R)  # the mirror image is the second tree
        child = np.flatnonzero(parent_R >= 0)
        source = np.concatenate([child, other_R[child]])
        target = np.concatenate([parent_R[child], other_R[parent_R[child]]])
        depth = np.tile(depth_R[child], 2)
        deepest, chunk = int(depth_R.max(initial=0)), num_bytes / 2 / self.num_chunks
        up = []
        for turn in range(deepest + self.num_chunks - 1 if deepest else 0):
            sends = (turn >= deepest - depth) & (turn < deepest - depth + self.num_chunks)
            up.append(Sends.of(source[sends], target[sends], chunk))
        return [*up, *reverse(up)]


def _tree(num_ranks: int) -> tuple[Ints, Ints]:
    """Parent (-1 for the root) and depth of each rank, in the tree whose in-order walk is 0 to R - 1."""
    parent_R, depth_R = np.full(num_ranks, -1), np.zeros(num_ranks, np.int64)
    waiting = [(0, num_ranks, -1, 0)]
    while waiting:
        low, high, parent, depth = waiting.pop()
        if low < high:
            middle = (low + high) // 2
            parent_R[middle], depth_R[middle] = parent, depth
            waiting += [(low, middle, middle, depth + 1), (middle + 1, high, middle, depth + 1)]
    return parent_R, depth_R


@dataclass(frozen=True)
class TwoShot:
    """Every rank adds up its share of all others' buffers, then hands it to all: two rounds, of all pairs.

    Source: TensorRT-LLM's and vLLM's custom all-reduce, for large messages inside a node.
    """

    def all_gather(self, ranks: Ranks, num_bytes: float) -> Schedule:
        """One round."""
        R = ranks.num_ranks
        return [Sends.of(np.arange(R)[:, None], np.arange(R), num_bytes / R)]

    def all_reduce(self, ranks: Ranks, num_bytes: float) -> Schedule:
        """Two rounds."""
        gather = self.all_gather(ranks, num_bytes)
        return [*reverse(gather), *gather]


@dataclass(frozen=True)
class Hierarchical:
    """Shares are added up inside each node, then between ranks of equal index, and handed back the same way.

    Source: Jia and others, arXiv 1807.11205, section 3.3.
    """

    def all_reduce(self, ranks: Ranks, num_bytes: float) -> Schedule:
        """Four rounds; two inside one node."""
        N, M = ranks.num_nodes, ranks.local
        n, a, b = np.ogrid[:N, :M, :M]
        inside = Sends.of(n * ranks.per_node + a, n * ranks.per_node + b, num_bytes / M)
        i, j, m = np.ogrid[:N, :N, :M]
        between = Sends.of(i * ranks.per_node + m, j * ranks.per_node + m, num_bytes / M / N)
        return [inside, between, between, inside] if N > 1 else [inside, inside]


@dataclass(frozen=True)
class InSwitch:
    """The switch adds up what it reads from all ranks of its node, and copies what they write: NVLS.

    Source: NVLink SHARP (NCCL 2.17, algorithm NVLS); Klenk and others, An In-Network Architecture for Accelerating
        Shared-Memory Multiprocessor Collectives, ISCA 2020.
    """

    def all_reduce(self, ranks: Ranks, num_bytes: float) -> Schedule:
        """One round, as reading, adding up and writing run together.

        Raises:
            ValueError: the ranks are in several nodes.
        """
        if ranks.num_nodes > 1:
            raise ValueError(f"an all-reduce in the switch is inside one node; {ranks.num_ranks} ranks are in several")
        own, whole = np.arange(ranks.num_ranks), num_bytes * (1 + 1 / ranks.num_ranks)
        up, down = Sends.of(own, ranks.num_ranks, whole), Sends.of(ranks.num_ranks, own, whole)
        return [Sends(*(np.concatenate(pair) for pair in zip(_fields(up), _fields(down), strict=True)))]


def _fields(sends: Sends) -> tuple[Ints, Ints, Floats]:
    return sends.source_F, sends.target_F, sends.bytes_F


def broadcast(ranks: Ranks, num_bytes: float, root: int = 0) -> Schedule:
    """From one rank to all, by a binomial tree: who has it sends it on, so that the number doubles each round.

    Source: Thakur, Rabenseifner, Gropp, IJHPCA 2005.
    """
    R, rounds = ranks.num_ranks, []
    have = 1
    while have < R:
        new = np.arange(have, min(2 * have, R))
        rounds.append(Sends.of((new - have + root) % R, (new + root) % R, num_bytes))
        have *= 2
    return rounds


def point_to_point(source: int, target: int, num_bytes: float) -> Schedule:
    """One message."""
    return [Sends.of(source, target, num_bytes)]


def sparse_all_gather(
    ranks: Ranks, holds_RI: NDArray[np.bool_], wants_RI: NDArray[np.bool_], bytes_I: Floats
) -> Schedule:
    """From one placement to another: each rank gets the items that it wants and has not, from one that holds them.

    A holder in its own node goes first, then one of its own index, then any; of several, the one that has sent least.
    Its `reverse` is a sparse reduce-scatter.

    Raises:
        ValueError: nobody holds an item that is wanted.
    """
    sent_R, chosen = np.zeros(ranks.num_ranks), []
    for rank, item in np.argwhere(wants_RI & ~holds_RI):
        holders = np.flatnonzero(holds_RI[:, item])
        if not holders.size:
            raise ValueError(f"item {item} is wanted by rank {rank} and held by none")
        near = (ranks.node_R[holders] != ranks.node_R[rank]) * 2 - (holders % ranks.per_node == rank % ranks.per_node)
        best = holders[np.lexsort((sent_R[holders], near))[0]]
        sent_R[best] += bytes_I[item]
        chosen.append((best, rank, bytes_I[item]))
    return [Sends.of(*np.array(chosen, np.float64).T)] if chosen else []


ALL_TO_ALLS: Mapping[str, type[AllToAll]] = {
    "flat": Flat, "low_latency": LowLatency, "leaders": Leaders, "two_level": TwoLevel, "rails": Rails,
    "gather_all": GatherAll,
}  # fmt: skip
ALL_REDUCES = {
    "ring": Ring, "tree": Tree, "two_shot": TwoShot, "hierarchical": Hierarchical, "in_switch": InSwitch,
}  # fmt: skip
