"""Staggered replay: the tokens of a decode iteration stand side by side in one circle of a trace's rows.

M requests of the trace take part with the first P tokens of their answers; an answer that is shorter starts again. Row u
of the circle is token u // M of the answer of request u mod M. Iteration s takes as many rows as there are requests from
s M on: request i replays traced request i mod M, i // M tokens ahead of the first request that does, and goes on by one
token an iteration. Where a run has no more requests than take part, that is plain replay; where it has more, requests
that share a traced one are at different tokens of it, while in plain replay they all choose the same experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Staggered:
    """The circle, unrolled so that each iteration is a slice of it.

    Attributes:
        num_traced: M.
        num_tokens: T, of the circle: M times P.
        places_U: int64 [T + B], places in the circle, 0 to T - 1 and on from 0; B tokens in an iteration.
        rows_U: int64 [T + B], their rows of the trace.
    """

    num_traced: int
    num_tokens: int
    places_U: NDArray[np.int64]
    rows_U: Rows

    @classmethod
    def of(
        cls, answers: Sequence[Rows], num_requests: int, num_steps: int, pool_tokens: int, multiple: int
    ) -> Staggered:
        """The circle for a run.

        Args:
            answers: rows of the answer of each traced request, in the order in which they are replayed.
            num_requests: of the run.
            num_steps: tokens that each of them decodes.
            pool_tokens: most tokens of the circle.
            multiple: of which M is one, if M is as large; with the requests of a rank, ranks' windows coincide.
        """
        num_traced = min(len(answers), num_requests, pool_tokens)
        if num_traced > multiple:
            num_traced -= num_traced % multiple
        taking_part = answers[:num_traced]
        num_steps = min(max(len(rows) for rows in taking_part), num_steps, pool_tokens // num_traced)
        step_P = np.arange(num_steps)
        rows_T = np.stack([rows[step_P % len(rows)] for rows in taking_part], axis=1).ravel()
        places_U = np.arange(len(rows_T) + num_requests) % len(rows_T)
        return cls(num_traced, len(rows_T), places_U, rows_T[places_U])

    @property
    def rows_T(self) -> Rows:
        """Rows of the trace in the order of the circle."""
        return self.rows_U[: self.num_tokens]

    def step(self, step: int, queries: int = 1) -> tuple[NDArray[np.int64], Rows]:
        """Places and rows of the tokens of an iteration: of each request its next `queries` tokens, side by side."""
        firsts = [(step * queries + q) * self.num_traced % self.num_tokens for q in range(queries)]
        size = len(self.places_U) - self.num_tokens
        return (
            np.stack([self.places_U[first : first + size] for first in firsts], axis=1).ravel(),
            np.stack([self.rows_U[first : first + size] for first in firsts], axis=1).ravel(),
        )

    def edges_U(self, edges: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places at which windows begin and end in any iteration, from those in iteration 0."""
        starts = np.arange(0, self.num_tokens, self.num_traced)
        return np.unique((starts[:, None] + edges) % self.num_tokens)

    def facts(self, num_requests: int) -> str:
        """One sentence on what is replayed."""
        apart = ", those that share one a token apart" if num_requests > self.num_traced else ""
        return (
            f"decoding replays a pool of {self.num_tokens} tokens of the trace: {num_requests} requests stand for "
            f"{self.num_traced} traced ones{apart}; after {self.num_tokens // self.num_traced} tokens answers repeat"
        )
