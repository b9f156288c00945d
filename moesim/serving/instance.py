"""An instance: its engine's numbers, its prices, its state, and the few things that are done to it from outside."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.costs import memory
from moesim.costs.operators import Operators
from moesim.files.acceptance import constant_rate
from moesim.service import EngineConfig, Service, kv_tokens
from moesim.serving.advance import advance
from moesim.serving.blocks import release
from moesim.serving.bundle import bundled
from moesim.serving.leap import LEAP, cut
from moesim.serving.memo import memoised
from moesim.serving.prices import NO_EXCHANGE, Prices
from moesim.serving.pricing import build_prices
from moesim.serving.schedule import enqueue
from moesim.serving.scratch import empty_scratch
from moesim.serving.state import PREFILLED, RUNNING, WAITING, Book, Groups, Rules, Timeline, open_groups
from moesim.serving.work import empty_work

Ints = NDArray[np.int64]
MOST = 20_000
"""Iterations of one compiled call, so that Ctrl-C is heard within a second or so."""


def rules_of(service: Service, engine: EngineConfig, is_prefill_only: bool = False) -> Rules:
    """An engine's numbers as compiled code takes them."""
    requests, num_blocks = service.requests, engine.num_gpu_blocks_override
    if num_blocks is None:
        num_blocks = kv_tokens(service, engine) // engine.block_size
    has_prefixes = engine.enable_prefix_caching and len(requests.block_ids) > 0
    block_bytes = max(memory.cache_bytes(service.model, engine.layout)[0], 1.0) * engine.block_size
    mixers = tuple(dict.fromkeys(layer.mixer for layer in service.model.layers if layer.mixer))
    drafts, is_memoised = engine.num_speculative_tokens, engine.routing == "memoised" or not service.model.moe_layers
    return Rules(
        engine.max_num_seqs, engine.max_num_batched_tokens, engine.enable_chunked_prefill,
        engine.long_prefill_token_threshold, engine.scheduler == "sglang", engine.scheduling_policy == "priority",
        engine.preemption_mode == "swap", is_prefill_only, engine.block_size, num_blocks, has_prefixes,
        requests.block_tokens if has_prefixes else 0,
        requests.block_tokens // engine.block_size if has_prefixes else 0,
        int(engine.swap_space_gib * 2**30 // block_bytes), block_bytes / service.cluster.host_link.bytes_per_s,
        1 + drafts, np.full(drafts, constant_rate(engine.acceptance_length, drafts) if drafts else 0.0),
        engine.pipeline_parallel_size,
        np.array([math.inf if mixer.window is None else mixer.window for mixer in mixers]),
        is_memoised, LEAP if is_memoised and not drafts and engine.pipeline_parallel_size == 1 else 1,
    )  # fmt: skip


def prices_of(service: Service, engine: EngineConfig, bound: str = "value") -> Prices:
    """What an engine's iterations cost, at the value or an end of the believed efficiencies."""
    operators = Operators(service.cluster.device, bound, service.tables, service.calibration)
    prices = build_prices(service.model, service.cluster, engine.layout, engine, service.trace, operators)
    if engine.routing == "memoised" and service.model.moe_layers:
        most = engine.data_parallel_size * engine.max_num_batched_tokens
        return memoised(prices, service.stream("memo"), most)
    return prices


@dataclass(eq=False)
class Instance:
    """One instance of an engine.

    Attributes:
        number: its own.
        group_Q: of each request that it has, the data-parallel group; shared by all instances.
        clock_s: up to when it has been played.
        next_s: when something happens in it next, if nothing new comes; infinity if nothing does.
    """

    number: int
    engine: EngineConfig
    rules: Rules
    prices: Prices
    book: Book
    group_Q: Ints
    timeline: Timeline
    num_units: int
    clock_s: float = 0.0
    next_s: float = math.inf
    num_iterations: int = 0

    def __post_init__(self) -> None:
        rules, prices, dp = self.rules, self.prices, self.engine.data_parallel_size
        self.groups = self._open_groups()
        most = dp * max(rules.max_num_batched_tokens, rules.max_num_seqs * rules.queries)
        num_slots = prices.slots_per_rank * (1 if prices.exchange == NO_EXCHANGE else len(prices.base_R))
        self.work = empty_work(
            dp, len(rules.window_V), dp * rules.max_num_seqs, 1 if rules.is_memoised else most,
            len(prices.place_LXE), num_slots,
        )  # fmt: skip
        self.scratch = empty_scratch(prices, dp, 1 if rules.is_memoised else most)
        self._bundle()

    def _bundle(self) -> None:
        """To be called whenever one of these is another."""
        self.bundle = bundled(
            self.book, self.groups, self.rules, self.group_Q, self.prices, self.work, self.scratch, self.timeline
        )

    def _open_groups(self) -> Groups:
        return open_groups(self.rules, self.engine.data_parallel_size, len(self.group_Q), self.num_units)

    def run(self, until_s: float, stops: bool = False, most: int = MOST) -> None:
        """Play it up to a time, at most so many iterations; with `stops`, or until a request leaves. See `advance`."""
        self.clock_s, self.next_s, begun = advance(self.bundle, self.clock_s, until_s, most, stops)
        self.num_iterations += begun

    def send(self, q: int, group: int, now_s: float) -> None:
        """Put a request in a group's queue."""
        self.come_to(now_s)
        self.group_Q[q] = group
        enqueue(self.bundle, group, q)

    def forget(self, q: int, group: int, now_s: float) -> None:
        """Give the blocks of a request back whose cache has been fetched."""
        self.come_to(now_s)
        release(self.bundle, group, q)

    def left(self) -> list[int]:
        """Requests that have left since the last call."""
        done = self.groups.done
        found: list[int] = done[1 : 1 + int(done[0])].tolist()
        done[0] = 0
        return found

    def lose(self, q_N: Ints, now_s: float) -> None:
        """Lose everything: these are the requests that it has, each of which will be computed anew."""
        self.come_to(now_s)
        book = self.book
        book.computed_Q[q_N], book.blocks_Q[q_N], book.held_Q[q_N], book.next_Q[q_N] = 0, 0, 0, -1
        book.is_swapped_Q[q_N], book.state_Q[q_N] = False, WAITING
        self.groups, self.next_s = self._open_groups(), math.inf
        self._bundle()

    def has(self, instance_Q: Ints) -> Ints:
        """The requests that it has, of which it is said who has each."""
        is_here_Q = np.isin(self.book.state_Q, (WAITING, RUNNING, PREFILLED))
        return np.flatnonzero(is_here_Q & (instance_Q == self.number))

    def slow_down(self, rank: int, factor: float, service: Service) -> None:
        """From the next iteration on, a rank takes so many times as long as it should."""
        slowdown_R = self.prices.slowdown_R.copy()
        slowdown_R[rank] = factor
        self.put(self.prices._replace(slowdown_R=slowdown_R), service)

    def put(self, prices: Prices, service: Service) -> None:
        """Take other prices, of which the memo (if there is one) is not yet made."""
        if self.rules.is_memoised and service.model.moe_layers:
            most = self.engine.data_parallel_size * self.engine.max_num_batched_tokens
            prices = memoised(prices, service.stream("memo"), most)
        self.prices = prices
        self._bundle()

    @property
    def unfinished_D(self) -> Ints:
        """Requests of each group that are running or waiting."""
        return self.groups.num_D + self.groups.waiting_D

    def come_to(self, now_s: float) -> None:
        """Note what it held until now, as something comes; look at its queues again as soon as it can."""
        if self.clock_s < now_s:
            self.run(now_s)
        if self.rules.leap > 1 and self.next_s > now_s:
            left = cut(self.bundle, now_s)
            if left:
                self.num_iterations -= left
                self.next_s = float(self.groups.finish_s_P[0])
        if self.next_s == math.inf or self.rules.num_stages > 1:
            self.next_s = self.clock_s
