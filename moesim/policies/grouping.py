"""Grouping: which of the tokens that wait are computed together? Decision: their positions, a batch of given size.

Fewer experts in a batch are fewer copies. What a token will use must be known before the model runs, from a router that
is before it or from a predictor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Grouping(Protocol):
    """A policy of this kind has no state."""

    def batch(self, ids_TLK: NDArray[np.integer], num_experts: int, size: int) -> Ids:
        """Positions of min(size, T) of the waiting tokens, each once; ids_TLK: the experts of each, oldest first."""


@dataclass(frozen=True)
class Arrival:
    """The oldest ones."""

    def batch(self, ids_TLK: NDArray[np.integer], num_experts: int, size: int) -> Ids:
        """The first of them."""
        return np.arange(min(size, len(ids_TLK)))


@dataclass(frozen=True)
class LongestQueue:
    """The tokens of the expert that most tokens wait for, then those of the next one, until the batch is full; an
    expert is that of a token's first choice in the first layer.

    Source: Read-ME (arXiv 2410.19123), where a token has the same expert in all layers.
    """

    def batch(self, ids_TLK: NDArray[np.integer], num_experts: int, size: int) -> Ids:
        """The lower expert of equals, older tokens first."""
        first_T = ids_TLK[:, 0, 0].astype(np.int64)
        queued_T = np.bincount(first_T, minlength=num_experts)[first_T]
        return np.asarray(np.argsort(first_T - queued_T * num_experts, kind="stable")[:size])


@dataclass(frozen=True)
class Regrouped:
    """Two batches' tokens in two groups of one size whose routes are alike: two means over the Hamming distance of the
    experts that tokens use, over all layers; the group with the oldest token goes first.

    rounds: assignments at most.
    Source: ExpertFlow (arXiv 2410.17954), token scheduler.
    """

    rounds: int = 10

    def batch(self, ids_TLK: NDArray[np.integer], num_experts: int, size: int) -> Ids:
        """Among the oldest 2 x size tokens."""
        T = min(2 * size, len(ids_TLK))
        if size >= T:
            return np.arange(T)
        L, first_T = ids_TLK.shape[1], np.arange(T)[:, None, None]
        uses_TLE = np.zeros((T, L, num_experts), np.float32)
        uses_TLE[first_T, np.arange(L)[:, None], ids_TLK[:T]] = 1.0
        uses_TP = uses_TLE.reshape(T, -1)
        shared_TT = uses_TP @ uses_TP.T  # all tokens use as many experts: the less two share, the farther they are
        one, other = np.unravel_index(int(shared_TT.argmin()), shared_TT.shape)
        towards_T = shared_TT[one] - shared_TT[other]
        chosen = np.zeros(0, np.int64)
        for _ in range(self.rounds):
            before, chosen = chosen, np.sort(np.argsort(-towards_T, kind="stable")[:size])
            if np.array_equal(before, chosen):
                break
            rest_T = np.ones(T, np.bool_)
            rest_T[chosen] = False
            towards_T = uses_TP @ (uses_TP[chosen].mean(axis=0) - uses_TP[rest_T].mean(axis=0))
        return chosen if 0 in chosen or 2 * size > T else np.setdiff1d(np.arange(T), chosen)


GROUPINGS: Mapping[str, type[Any]] = {"arrival": Arrival, "longest_queue": LongestQueue, "regrouped": Regrouped}
