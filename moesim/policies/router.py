"""Router: which instance, and which data-parallel rank of it, gets a request? Decision: instance x D + rank.

I instances of D data-parallel ranks each; what `place` means everywhere here is instance x D + rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Arrival:
    """What is known of a request that has come.

    Attributes:
        number: its place in the workload.
        prompt_tokens: its length.
        topic: its client or conversation, -1 where nothing is known.
    """

    number: int
    prompt_tokens: int
    topic: int = -1


@dataclass(eq=False)
class RouterView:
    """What a router may see, as it is now; the fleet keeps the arrays up to date in place.

    Attributes:
        up_I: whether an instance takes requests.
        waiting_ID, running_ID: requests.
        waiting_tokens_ID: prompt tokens that are still to be computed.
        kv_tokens_ID, kv_capacity_ID: tokens whose keys and values requests hold, and the most there can be.
        cached_tokens: request -> prefix tokens of it that each rank holds, [I, D].
        votes: request -> token-expert pairs of its prompt that history expects at each rank, [I, D] (see
            `expert_votes`); None where no history is known.
        work_tokens_ID: prompt and answer tokens still to be computed; only oracles look at it, for others it may be
            left empty.
    """

    up_I: NDArray[np.bool_]
    waiting_ID: Ints
    running_ID: Ints
    waiting_tokens_ID: Ints
    kv_tokens_ID: Ints
    kv_capacity_ID: Ints
    cached_tokens: Callable[[int], Ints]
    votes: Callable[[int], Floats] | None = None
    work_tokens_ID: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    @classmethod
    def idle(cls, num_instances: int, num_ranks: int, kv_capacity: int) -> RouterView:
        """A fleet without requests, all of it up."""
        zeros = [np.zeros((num_instances, num_ranks), np.int64) for _ in range(6)]
        full_ID = np.full((num_instances, num_ranks), kv_capacity)
        up_I = np.ones(num_instances, np.bool_)
        waiting_ID, running_ID, waiting_tokens_ID, kv_tokens_ID, cached_ID, work_tokens_ID = zeros
        return cls(
            up_I, waiting_ID, running_ID, waiting_tokens_ID, kv_tokens_ID, full_ID, lambda request: cached_ID,
            work_tokens_ID=work_tokens_ID,
        )  # fmt: skip

    @property
    def load_ID(self) -> Ints:
        """Requests at each rank."""
        return self.waiting_ID + self.running_ID

    def least(self, score_ID: Ints | Floats) -> int:
        """The place with the lowest score of those up, the first of several.

        Raises:
            RuntimeError: no instance is up; the fleet must hold requests back until one is.
        """
        score_N = score_ID.ravel() if self.up_I.all() else np.where(self.up_I[:, None], score_ID, np.inf).ravel()
        place = int(score_N.argmin())
        if not self.up_I[place // score_ID.shape[1]]:
            raise RuntimeError("no instance is up that could take a request")
        return place

    def up_places(self) -> Ints:
        """All places of instances that are up."""
        return np.flatnonzero(np.repeat(self.up_I, self.waiting_ID.shape[1]))


Choose = Callable[[Arrival], int]
"""Decides one request after the other; made anew for each run by a policy's `start(view, random)`."""


class Router(Protocol):
    """A policy."""

    def start(self, view: RouterView, random: np.random.Generator) -> Choose:
        """Decisions of one run."""


def expert_votes(load_LE: Floats, home_LE: Ints, num_ranks: int) -> Floats:
    """Votes of a prompt for the data-parallel ranks where its experts lie, [D].

    load_LE: token-expert pairs that history expects of the prompt (of its topic, or of its traced tokens).
    home_LE: data-parallel rank that holds each expert.
    """
    return np.asarray(np.bincount(home_LE.ravel(), load_LE.ravel(), num_ranks), np.float64)


@dataclass(frozen=True)
class RoundRobin:
    """One after the other: first over the instances, then over their ranks."""

    def start(self, view: RouterView, random: np.random.Generator) -> Choose:
        """Decisions of one run."""
        num_instances, num_ranks = view.waiting_ID.shape
        last_ID = np.arange(view.waiting_ID.size).reshape(num_ranks, num_instances).T.copy()  # the longest ago is next

        def choose(arrival: Arrival) -> int:
            place = view.least(last_ID)
            last_ID.flat[place] = last_ID.max() + 1
            return place

        return choose


@dataclass(frozen=True)
class Random:
    """Any one, all alike."""

    def start(self, view: RouterView, random: np.random.Generator) -> Choose:
        """Decisions of one run."""
        return lambda arrival: view.least(random.random(view.waiting_ID.shape))


@dataclass(frozen=True)
class PowerOfTwoChoices:
    """Of two picked at random, the one with fewer requests.

    Source: Mitzenmacher (IEEE Transactions on Parallel and Distributed Systems, 2001); SGLang router's power_of_two.
    """

    def start(self, view: RouterView, random: np.random.Generator) -> Choose:
        """Decisions of one run."""

        def choose(arrival: Arrival) -> int:
            up_N = view.up_places()
            if len(up_N) < 2:
                return view.least(view.load_ID)
            first = int(random.integers(len(up_N)))
            second = int(random.integers(len(up_N) - 1))
            a, b = int(up_N[first]), int(up_N[second + (second >= first)])
            load_N = view.load_ID.ravel()
            return b if load_N[b] < load_N[a] else a

        return choose


@dataclass(frozen=True)
class LeastLoaded:
    """Fewest requests, waiting and running."""

    def start(self, view: RouterView, random: np.random.Generator) -> Choose:
        """Decisions of one run."""
        return lambda arrival: view.least(view.load_ID)


@dataclass(frozen=True)
class VllmLoad:
    """Lowest 4 x waiting + running.

    Source: vLLM's load balancer over data-parallel ranks (vllm/v1/engine/core_client.py, DPLBAsyncMPClient). There the
    counts are up to 100 ms old, and what the client has sent since is added; here they are always fresh.
    """

    def start(self, view: RouterView, random: np.random.Generator) -> Choose:
        """Decisions of one run."""
        return lambda arrival: view.least(4 * view.waiting_ID + view.running_ID)


@dataclass(frozen=True)
class LeastTokens:
    """Fewest tokens: prompts that wait, and keys and values that are held. Source: SGLang's total_tokens balancing."""

    def start(self, view: RouterView, random: np.random.Generator) -> Choose:
        """Decisions of one run."""
        return lambda arrival: view.least(view.waiting_tokens_ID + view.kv_tokens_ID)


@dataclass(frozen=True)
class ShortestQueue:
    """Fewest waiting requests; of those alike, fewest running.

    Source: join the shortest queue (Winston, Journal of Applied Probability, 1977), where only those waiting count.
    """

    def start(self, view: RouterView, random: np.random.Generator) -> Choose:
        """Decisions of one run."""
        return lambda arrival: view.least(view.waiting_ID * (view.running_ID.max() + 1) + view.running_ID)


@dataclass(frozen=True)
class PrefixAware:
    """Who holds most of the prompt, unless loads are far apart or nobody holds enough; then fewest requests.

    Source: SGLang router's cache_aware policy, with its defaults. Its router guesses from what it has sent what an
    instance still holds; here the caches themselves are asked.
    """

    cache_threshold: float = 0.5
    balance_abs_threshold: int = 32
    balance_rel_threshold: float = 1.0001

    def start(self, view: RouterView, random: np.random.Generator) -> Choose:
        """Decisions of one run."""

        def choose(arrival: Arrival) -> int:
            load_ID = view.load_ID
            up_ID = load_ID if view.up_I.all() else load_ID[view.up_I]
            high, low = (int(up_ID.max()), int(up_ID.min())) if up_ID.size else (0, 0)
            if high - low > self.balance_abs_threshold and high > low * self.balance_rel_threshold:
                return view.least(load_ID)
            cached_ID = view.cached_tokens(arrival.number)
            place = view.least(load_ID - cached_ID * (high + 1))  # most cached, then fewest requests
            if cached_ID.ravel()[place] > self.cache_threshold * arrival.prompt_tokens:
                return place
            return view.least(load_ID)

        return choose


@dataclass(frozen=True)
class KvAware:
    """Least work: overlap_weight x prompt tokens to compute (waiting ones and its own uncached ones) + tokens held.

    Source: NVIDIA Dynamo's KV router at temperature 0 (overlap_score_weight 1, prefill blocks + active blocks). A
    weight far above 1 ranks by prefill alone, as Mooncake's estimate of the time to first token does (arXiv
    2407.00079, algorithm 1).
    """

    overlap_weight: float = 1.0

    def start(self, view: RouterView, random: np.random.Generator) -> Choose:
        """Decisions of one run."""

        def choose(arrival: Arrival) -> int:
            prefill_ID = view.waiting_tokens_ID + arrival.prompt_tokens - view.cached_tokens(arrival.number)
            return view.least(np.asarray(self.overlap_weight * prefill_ID + view.kv_tokens_ID, np.float64))

        return choose


@dataclass(frozen=True)
class ExpertAware:
    """The rank where most of the prompt's experts are expected, each rank once a round; without history, in turn.

    Source: Semantic Parallelism (Sem-MoE, arXiv 2503.04398), scheduling of requests over attention-data-parallel ranks:
    the mask over ranks that had their turn keeps counts equal.
    """

    def start(self, view: RouterView, random: np.random.Generator) -> Choose:
        """Decisions of one run."""
        masked_ID = np.zeros(view.waiting_ID.shape, np.bool_)

        def choose(arrival: Arrival) -> int:
            if masked_ID[view.up_I].all():
                masked_ID[:] = False
            votes_ID = view.votes(arrival.number) if view.votes is not None else masked_ID
            place = view.least(np.where(masked_ID, np.inf, -1.0 * votes_ID))
            masked_ID.flat[place] = True
            return place

        return choose


@dataclass(frozen=True)
class SessionAffinity:
    """All requests of a topic go to one place while it is up; those without one to the fewest requests.

    Source: highest random weight hashing (Thaler, Ravishankar, IEEE/ACM Transactions on Networking, 1998): when an
    instance goes down, only its own topics move.
    """

    def start(self, view: RouterView, random: np.random.Generator) -> Choose:
        """Decisions of one run."""
        place_ID = np.arange(view.waiting_ID.size, dtype=np.uint64).reshape(view.waiting_ID.shape)

        def choose(arrival: Arrival) -> int:
            if arrival.topic < 0:
                return view.least(view.load_ID)
            mixed_ID = place_ID * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(arrival.topic + 1)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's finaliser
                mixed_ID = (mixed_ID ^ mixed_ID >> np.uint64(shift)) * np.uint64(factor)
            return view.least((mixed_ID >> np.uint64(12)).astype(np.int64))

        return choose


@dataclass(frozen=True)
class OracleLeastWork:
    """Fewest tokens still to be computed, answers included, whose lengths nobody knows: a bound for the others."""

    needs_future = True

    def start(self, view: RouterView, random: np.random.Generator) -> Choose:
        """Decisions of one run."""
        return lambda arrival: view.least(view.work_tokens_ID)


ROUTERS: dict[str, type[Router]] = {
    "round_robin": RoundRobin,
    "random": Random,
    "power_of_two_choices": PowerOfTwoChoices,
    "least_loaded": LeastLoaded,
    "least_tokens": LeastTokens,
    "vllm_load": VllmLoad,
    "shortest_queue": ShortestQueue,
    "prefix_aware": PrefixAware,
    "kv_aware": KvAware,
    "expert_aware": ExpertAware,
    "session_affinity": SessionAffinity,
    "oracle_least_work": OracleLeastWork,
}
