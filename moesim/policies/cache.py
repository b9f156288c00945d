"""Expert cache: which resident expert leaves when another needs its room? Decision: one victim.

Experts of one layer share that layer's slots in device memory. `view` shows the past of the layer only; a policy whose
name begins with Oracle is also given the future.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass
class CacheView:
    """What a cache decision may look at.

    last_use_LE: int64 [L, E], step of the last use, -1 for never; num_uses_LE: int64 [L, E], steps with a use so far.
    """

    step: int
    last_use_LE: NDArray[np.int64]
    num_uses_LE: NDArray[np.int64]


class Cache(Protocol):
    """The decision object of one run."""

    def victim(self, layer: int, candidates: Sequence[int], view: CacheView) -> int:
        """One of the candidates (sorted by id), to be overwritten."""


@dataclass(frozen=True)
class LRU:
    """Least recently used leaves. Source: mixtral-offloading (arXiv 2312.17238), section 3.1."""

    needs_future = False

    def start(self, future: object = None) -> Cache:
        """The decision object for one run."""
        return self

    def victim(self, layer: int, candidates: Sequence[int], view: CacheView) -> int:
        """The candidate whose last use is oldest, lowest id first."""
        return min(candidates, key=lambda expert: (view.last_use_LE[layer, expert], expert))


@dataclass(frozen=True)
class LFU:
    """Least frequently used leaves, the older one of two. Source: MoE-Infinity (arXiv 2401.14361) names it as rival."""

    needs_future = False

    def start(self, future: object = None) -> Cache:
        """The decision object for one run."""
        return self

    def victim(self, layer: int, candidates: Sequence[int], view: CacheView) -> int:
        """The candidate with the fewest uses."""
        uses, last = view.num_uses_LE[layer], view.last_use_LE[layer]
        return min(candidates, key=lambda expert: (uses[expert], last[expert], expert))


@dataclass(frozen=True)
class OracleBelady:
    """The expert whose next use is farthest leaves: the floor of misses. Source: Belady, IBM Systems Journal 1966."""

    needs_future = True

    def start(self, future: object = None) -> Cache:
        """The decision object for one run; `future` is bool [S, L, E]: which experts each step will use."""
        if not isinstance(future, np.ndarray):
            raise TypeError("OracleBelady needs the uses of all steps")
        return _Belady(future)


@dataclass(frozen=True, eq=False)
class _Belady:
    used_SLE: NDArray[np.bool_] = field(repr=False)

    def victim(self, layer: int, candidates: Sequence[int], view: CacheView) -> int:
        """The candidate that is not needed for the longest time."""
        later_SC = self.used_SLE[view.step + 1 :, layer][:, list(candidates)]
        distance = np.where(later_SC.any(axis=0), later_SC.argmax(axis=0), len(later_SC)) if len(later_SC) else [0]
        return candidates[int(np.argmax(distance))]


CACHES = {"lru": LRU, "lfu": LFU, "oracle_belady": OracleBelady}
