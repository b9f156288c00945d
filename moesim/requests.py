"""Requests that arrive over time: when, how long, with which prefix, and of which topic."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Requests:
    """Q requests, by arrival.

    Attributes:
        arrival_s_Q: seconds from the start, non-decreasing; where `concurrency` is given, none is sent before a place
            is free, whatever it says.
        prompt_Q, output_Q: tokens of each prompt, and of each answer, at least 1.
        priority_Q: lower ones go first (vLLM).
        topic_Q: number of the client or conversation that a request belongs to, -1 where nothing is known; requests of
            a topic replay like routing.
        block_start_Q, block_ids: prefix blocks of `block_tokens` tokens each: those of request q are
            block_ids[block_start_Q[q] : block_start_Q[q + 1]], numbered 0, 1, ... over the workload. Equal numbers are
            equal text with equal text before it. [Q + 1] and [N]; all empty where nothing is known of prefixes.
        concurrency: clients that each send their next request when the last one is answered; None for open arrivals.
        think_s: seconds that such a client waits between.
        source: where they come from.
        notes: what a reader of a result should know about them.
    """

    arrival_s_Q: Floats
    prompt_Q: Ints
    output_Q: Ints
    priority_Q: Ints
    topic_Q: Ints
    block_start_Q: Ints
    block_ids: Ints
    block_tokens: int = 0
    concurrency: int | None = None
    think_s: float = 0.0
    source: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)

    @classmethod
    def of(cls, arrival_s_Q: Floats, prompt_Q: Ints, output_Q: Ints, source: str = "") -> Requests:
        """Requests of which nothing but times and lengths is known."""
        num = len(arrival_s_Q)
        zeros = np.zeros(num, np.int64)
        return cls(
            np.asarray(arrival_s_Q, np.float64), np.asarray(prompt_Q, np.int64), np.asarray(output_Q, np.int64),
            zeros, zeros - 1, np.zeros(num + 1, np.int64), np.zeros(0, np.int64), source=source,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.arrival_s_Q)

    @property
    def rate_per_s(self) -> float:
        """Mean arrivals a second, from the first to the last; infinite where all come at once."""
        span_s = float(self.arrival_s_Q[-1] - self.arrival_s_Q[0])
        return (len(self) - 1) / span_s if span_s > 0 else float("inf")

    def at_rate(self, rate_per_s: float) -> Requests:
        """The same requests, all gaps between them stretched so that they come at another mean rate."""
        first_s = self.arrival_s_Q[0]
        stretched = first_s + (self.arrival_s_Q - first_s) * (self.rate_per_s / rate_per_s)
        return replace(self, arrival_s_Q=stretched)

    def take(self, rows: Ints) -> Requests:
        """Some of the requests, or some of them several times, in this order."""
        given = np.diff(self.block_start_Q)[rows]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(given)])
        place = np.arange(starts[-1]) + np.repeat(self.block_start_Q[rows] - starts[:-1], given)
        by_request = ("arrival_s_Q", "prompt_Q", "output_Q", "priority_Q", "topic_Q")
        taken = {name: getattr(self, name)[rows] for name in by_request}
        return replace(self, **taken, block_start_Q=starts, block_ids=self.block_ids[place])
