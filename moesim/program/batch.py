"""What one iteration computes: requests with their contexts, the groups they belong to, and the tokens' routing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
        lengths_Q: tokens of each request's prompt.
        group_Q: data-parallel group of each request.
        group_B: data-parallel group of each token.
        num_groups: D.
    """

    request_Q: Ids
    lengths_Q: Ids
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

    @cached_property
    def lengths_D(self) -> Floats:
        """Prompt tokens of each group."""
        return np.bincount(self.group_Q, self.lengths_Q, self.num_groups).astype(np.float64)

    def part(self, in_Q: NDArray[np.bool_], in_B: NDArray[np.bool_]) -> Members:
        """Some of the requests, with their tokens."""
        request_Q, lengths_Q, group_Q = self.request_Q[in_Q], self.lengths_Q[in_Q], self.group_Q[in_Q]
        return Members(request_Q, lengths_Q, group_Q, self.group_B[in_B], self.num_groups)

    def first_Q(self, weight_Q: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The first requests of each group, of about half of its weight."""
        total_D = np.bincount(self.group_Q, weight_Q, self.num_groups)
        order = np.argsort(self.group_Q, kind="stable")
        before_Q = np.empty(len(order))
        before_Q[order] = np.cumsum(weight_Q[order]) - weight_Q[order] / 2
        start_D = np.concatenate([[0], np.cumsum(total_D)[:-1]])
        return np.asarray(before_Q - start_D[self.group_Q] < total_D[self.group_Q] / 2)

    def piece_Q(self, number: int) -> Ids:
        """Each group's requests in so many pieces, the first ones first: the piece of each request."""
        order, place_Q = np.argsort(self.group_Q, kind="stable"), np.empty(len(self.group_Q), np.int64)
        sizes_D = self.requests_D.astype(np.int64)
        place_Q[order] = np.arange(len(order)) - np.repeat(np.cumsum(sizes_D) - sizes_D, sizes_D)
        return np.asarray(place_Q * number // np.maximum(sizes_D[self.group_Q], 1))

    def split(self, piece_Q: Ids, piece_B: Ids, number: int) -> Parts:
        """Which tokens are in each piece, and whose they are."""
        return tuple((piece_B == n, self.part(piece_Q == n, piece_B == n)) for n in range(number))

    @cached_property
    def alike(self) -> dict[str, Parts]:
        """Parts that were made of requests which all have as many tokens, by how."""
        return {}


Parts = tuple[tuple[NDArray[np.bool_], Members], ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """The work of one iteration.

    Attributes:
        phase: "prefill" or "decode".
        members: its requests and their groups.
        rows_B: row of the trace for each token.
        queries: in decode, tokens of each request that are computed at once: one, and those drafted.
        step: in decode, how many tokens of its answer each request has replayed before.
        grown: in decode, tokens of each request's context beyond its prompt.
    """

    phase: str
    members: Members
    rows_B: Ids
    queries: int = 1
    step: int = 0
    grown: int = 0

    def halves(self) -> list[Batch]:
        """The first half of the requests of each group, and the other one; in prefill, of about as many tokens."""

        def second_Q(weight_Q: Ids) -> Ids:
            return (~self.members.first_Q(weight_Q)).astype(np.int64)

        return self._cut("halves", second_Q, 2)

    def pieces(self, number: int) -> list[Batch]:
        """The requests of each group in so many batches, the first ones first."""
        return self._cut(f"{number} pieces", lambda _: self.members.piece_Q(number), number)

    def _cut(self, how: str, piece_Q: Callable[[Ids], Ids], number: int) -> list[Batch]:
        """Parts by the piece of each request, given its tokens; those of decoding are kept."""
        members, decodes = self.members, self.phase == "decode"
        parts = members.alike.get(how) if decodes else None
        if parts is None:
            tokens_Q = np.full_like(members.lengths_Q, self.queries) if decodes else members.lengths_Q
            of_Q = piece_Q(tokens_Q)
            parts = members.split(of_Q, np.repeat(of_Q, tokens_Q), number)
            if decodes:
                members.alike[how] = parts
        return [replace(self, members=part, rows_B=self.rows_B[in_B]) for in_B, part in parts]

    def pairs_D(self, window: int | None) -> Floats:
        """Query-key pairs of one layer in each group: causal in prefill, the whole context in decode."""
        if self.phase == "decode":
            return self.queries * self.kept_D(window)
        n = self.members.lengths_Q.astype(np.float64)
        w = n if window is None else np.minimum(n, window)
        pairs_Q = n * w - w * (w - 1) / 2
        return np.bincount(self.members.group_Q, pairs_Q, self.members.num_groups).astype(np.float64)

    def kept_D(self, window: int | None) -> Floats:
        """Cached tokens that the requests of each group read."""
        members = self.members
        if window is None:
            return members.lengths_D + self.grown * members.requests_D
        kept_Q = np.minimum(members.lengths_Q + self.grown, window)
        return np.bincount(members.group_Q, kept_Q, members.num_groups).astype(np.float64)
