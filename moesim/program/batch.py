"""What one iteration computes: requests with their contexts, the groups they belong to, and the tokens' routing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Members:
    """Which requests an iteration has, and where; those of decoding are the same in every iteration.

    Attributes:
        request_Q: number of each request.
        group_Q: data-parallel group of each request.
        group_B: data-parallel group of each token.
        num_groups: D.
    """

    request_Q: Ids
    group_Q: Ids
    group_B: Ids
    num_groups: int

    @cached_property
    def tokens_D(self) -> Floats:
        """Tokens of each group."""
        return np.bincount(self.group_B, minlength=self.num_groups).astype(np.float64)

    @cached_property
    def requests_D(self) -> Floats:
        """Requests of each group."""
        return np.bincount(self.group_Q, minlength=self.num_groups).astype(np.float64)

    def part(self, in_Q: NDArray[np.bool_], in_B: NDArray[np.bool_]) -> Members:
        """Some of the requests, with their tokens."""
        return Members(self.request_Q[in_Q], self.group_Q[in_Q], self.group_B[in_B], self.num_groups)

    def first_Q(self, weight_Q: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The first requests of each group, of about half of its weight."""
        total_D = np.bincount(self.group_Q, weight_Q, self.num_groups)
        order = np.argsort(self.group_Q, kind="stable")
        before_Q = np.empty(len(order))
        before_Q[order] = np.cumsum(weight_Q[order]) - weight_Q[order] / 2
        start_D = np.concatenate([[0], np.cumsum(total_D)[:-1]])
        return np.asarray(before_Q - start_D[self.group_Q] < total_D[self.group_Q] / 2)

    @cached_property
    def alike_halves(self) -> tuple[tuple[NDArray[np.bool_], NDArray[np.bool_], Members], ...]:
        """Halves of requests that all have as many tokens: which requests and tokens, and as members."""
        first_Q = self.first_Q(np.ones_like(self.group_Q))
        first_B = np.repeat(first_Q, len(self.group_B) // max(len(self.group_Q), 1))
        return tuple((in_Q, in_B, self.part(in_Q, in_B)) for in_Q, in_B in ((first_Q, first_B), (~first_Q, ~first_B)))


@dataclass(frozen=True, eq=False)
class Batch:
    """The work of one iteration.

    Attributes:
        phase: "prefill" or "decode".
        lengths_Q: tokens of each request: the prompt (prefill), or the context it looks back on (decode).
        members: its requests and their groups.
        rows_B: row of the trace for each token.
        queries: in decode, tokens of each request that are computed at once: one, and those drafted.
        step: in decode, how many tokens each request has decoded before.
    """

    phase: str
    lengths_Q: Ids
    members: Members
    rows_B: Ids
    queries: int = 1
    step: int = 0

    def halves(self) -> tuple[Batch, Batch]:
        """The first half of the requests of each group, and the other one; in prefill, of about as many tokens."""
        if self.phase == "decode":
            one, other = self.members.alike_halves
        else:
            in_Q = self.members.first_Q(self.lengths_Q)
            in_B = np.repeat(in_Q, self.lengths_Q)
            one, other = ((q, b, self.members.part(q, b)) for q, b in ((in_Q, in_B), (~in_Q, ~in_B)))
        return self._part(*one), self._part(*other)

    def _part(self, in_Q: NDArray[np.bool_], in_B: NDArray[np.bool_], members: Members) -> Batch:
        return Batch(self.phase, self.lengths_Q[in_Q], members, self.rows_B[in_B], self.queries, self.step)

    def pairs_D(self, window: int | None) -> Floats:
        """Query-key pairs of one layer in each group: causal in prefill, the whole context in decode."""
        if self.phase == "decode":
            return self.queries * self.kept_D(window)
        n = self.lengths_Q.astype(np.float64)
        w = n if window is None else np.minimum(n, window)
        pairs_Q = n * w - w * (w - 1) / 2
        return np.bincount(self.members.group_Q, pairs_Q, self.members.num_groups).astype(np.float64)

    def kept_D(self, window: int | None) -> Floats:
        """Cached tokens that the requests of each group read."""
        n = self.lengths_Q if window is None else np.minimum(self.lengths_Q, window)
        return np.bincount(self.members.group_Q, n, self.members.num_groups).astype(np.float64)
