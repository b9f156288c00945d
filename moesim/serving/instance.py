"""An instance: its engine's numbers, its prices, its state, and the few things that are done to it from outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.costs.operators import Operators
from moesim.layout import AttentionGrid, ExpertGrid, Layout, Placement
from moesim.service import EngineConfig, Service, kv_tokens
from moesim.serving.advance import advance, note_waiting
from moesim.serving.blocks import release
from moesim.serving.prices import Prices
from moesim.serving.pricing import build_prices
from moesim.serving.schedule import enqueue
from moesim.serving.scratch import empty_scratch
from moesim.serving.state import Book, Rules, Timeline, open_groups
from moesim.serving.work import empty_work

Ints = NDArray[np.int64]
FOREVER = np.iinfo(np.int64).max


def layout_of(engine: EngineConfig) -> Layout:
    """Rank grids of one instance."""
    dp, tp = engine.data_parallel_size, engine.tensor_parallel_size
    experts = ExpertGrid(ep=dp * tp) if engine.enable_expert_parallel and dp * tp > 1 else ExpertGrid(edp=dp, etp=tp)
    redundant = engine.num_redundant_experts
    return Layout(AttentionGrid(dp=dp, tp=tp), experts, redundant, pp=engine.pipeline_parallel_size)


def rules_of(service: Service, engine: EngineConfig, is_prefill_only: bool = False) -> Rules:
    """An engine's numbers as compiled code takes them."""
    requests, num_blocks = service.requests, engine.num_gpu_blocks_override
    if num_blocks is None:
        num_blocks = kv_tokens(service, engine) // engine.block_size
    has_prefixes = engine.enable_prefix_caching and len(requests.block_ids) > 0
    tp = engine.tensor_parallel_size
    kv_bytes = service.model.kv_bytes_per_token(tp) * engine.block_size
    mixers = tuple(dict.fromkeys(layer.mixer for layer in service.model.layers if layer.mixer))
    drafts = engine.num_speculative_tokens
    return Rules(
        engine.max_num_seqs, engine.max_num_batched_tokens, engine.enable_chunked_prefill,
        engine.long_prefill_token_threshold, engine.scheduler == "sglang", engine.scheduling_policy == "priority",
        engine.preemption_mode == "swap", is_prefill_only, engine.block_size, num_blocks, has_prefixes,
        requests.block_tokens if has_prefixes else 0,
        requests.block_tokens // engine.block_size if has_prefixes else 0,
        int(engine.swap_space_gib * 2**30 // kv_bytes), kv_bytes / service.cluster.host_link.bytes_per_s, 1 + drafts,
        chances(engine.acceptance_length, drafts), engine.pipeline_parallel_size,
        np.array([math.inf if mixer.window is None else mixer.window for mixer in mixers]),
        engine.routing == "memoised",
    )  # fmt: skip


def chances(acceptance_length: float, drafts: int) -> NDArray[np.float64]:
    """One chance for every draft, given that those before it were right, with that many tokens in the mean.

    Solves 1 + a + a^2 + ... + a^drafts = length; source: Leviathan, Kalman, Matias, arXiv 2211.17192, equation 1.

    >>> chances(1.75, 2).round(6).tolist()
    [0.5, 0.5]
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**k for k in range(drafts + 1)) < acceptance_length:
            low = middle
        else:
            high = middle
    return np.full(drafts, (low + high) / 2)


def prices_of(service: Service, engine: EngineConfig, bound: str = "value") -> Prices:
    """What an engine's iterations cost, at the value or an end of the believed efficiencies."""
    operators = Operators(service.cluster.device, bound, service.tables, service.calibration)
    return build_prices(service.model, service.cluster, layout_of(engine), engine, service.trace, operators)


@dataclass
class Instance:
    """One instance of an engine.

    Attributes:
        number: its own.
        group_Q: of each request that it has, the data-parallel group; shared by all instances.
        clock_s: when its last iteration ends (or ended).
        is_up: whether it takes requests.
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
    is_up: bool = True

    def __post_init__(self) -> None:
        engine, rules, prices = self.engine, self.rules, self.prices
        dp = engine.data_parallel_size
        self.groups = open_groups(rules, dp, len(self.group_Q), self.num_units)
        most = dp * max(rules.max_num_batched_tokens, rules.max_num_seqs * rules.queries)
        num_slots = prices.params_LRS.shape[2] * (dp * engine.tensor_parallel_size if len(prices.base_R) > dp else 1)
        self.work = empty_work(
            dp, len(rules.window_V), dp * rules.max_num_seqs, 1 if rules.is_memoised else most,
            len(prices.params_LRS), num_slots,
        )  # fmt: skip
        self.scratch = empty_scratch(prices, dp, 1 if rules.is_memoised else most)

    def send(self, q: int, group: int, now_s: float) -> None:
        """Put a request in a group's queue."""
        self.group_Q[q] = group
        note_waiting(self.timeline, now_s, self.clock_s)
        enqueue(self.book, self.groups, self.rules, group, q)

    def run(self, now_s: float, until_s: float, stops: bool, most: int = FOREVER) -> float:
        """Run iterations that begin before `until_s`; when the last one ends, infinite if there is nothing to do."""
        end_s = advance(
            self.book, self.groups, self.rules, self.group_Q, self.prices, self.work, self.scratch, self.timeline,
            max(now_s, self.clock_s), until_s, most, stops,
        )  # fmt: skip
        if end_s < math.inf:
            self.clock_s = end_s
        return float(end_s)

    def left(self) -> Sequence[int]:
        """Requests that have left since the last call."""
        done = self.groups.done
        found: list[int] = done[1 : 1 + int(done[0])].tolist()
        done[0] = 0
        return found

    def forget(self, q: int) -> None:
        """Give the blocks of a request back whose cache has been fetched."""
        release(self.book, self.groups, self.rules, int(self.group_Q[q]), q)

    @property
    def unfinished_D(self) -> Ints:
        """Requests of each group that are running or waiting."""
        return self.groups.num_D + self.groups.waiting_D


__all__ = ["Instance", "Placement", "chances", "layout_of", "prices_of", "rules_of"]
