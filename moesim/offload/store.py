"""Where experts are: absent, on their way, or on the device; and who makes room for whom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.offload.timeline import Task
from moesim.policies.view import Ids, View


@dataclass
class Uses:
    """How often an expert was needed, by where it was found.

    cached: on the device since an earlier use, or from the beginning; prefetched: brought there for this use;
    late: still on its way; missed: neither.
    """

    cached: int = 0
    prefetched: int = 0
    late: int = 0
    missed: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.cached + self.prefetched + self.late + self.missed

    @property
    def hit_rate(self) -> float:
        """Share that was on the device or on its way, 0 where nothing was needed."""
        return 1 - self.missed / self.total if self.total else 0.0


class HostLevel:
    """Host memory in front of a disk: it has room for `slots` experts, and keeps those that were asked for last."""

    def __init__(self, slots: int) -> None:
        self._slots, self._held = slots, dict.fromkeys(range(slots))  # in the order of asking

    def read(self, places: Iterable[int]) -> list[int]:
        """Ask for places; those that must be read from disk."""
        lacking = []
        for place in places:
            if place in self._held:
                del self._held[place]
            else:
                lacking.append(place)
                if len(self._held) >= self._slots and self._held:
                    del self._held[next(iter(self._held))]
            if self._slots:
                self._held[place] = None
        return lacking

    def forget(self, places: Iterable[int]) -> None:
        """Reads that will not be made."""
        for place in places:
            self._held.pop(place, None)


class ExpertStore:
    """Slots of a device and the experts in them.

    Args:
        slots: experts that fit, over all layers.
        policy: of `moesim.policies.cache.CACHES`.
        future_SLE: tokens of each expert in each step, for oracles only. history_LE: uses in earlier requests.

    Attributes:
        cache: the policy's decision object; is_shared: whether layers share the slots.
        free, free_L: slots without an expert, all and of each layer.
        stages: places of experts that came early into buffers, with their copies.
    """

    def __init__(
        self, view: View, slots: int, policy: Any, future_SLE: NDArray[np.integer] | None = None,
        history_LE: NDArray[np.int64] | None = None,
    ) -> None:  # fmt: skip
        L, E = view.num_layers, view.num_experts
        view.slots = min(slots, L * E)
        self.view, self.uses, self.num_prefetched = view, Uses(), 0
        self.slots_L = policy.slots_L(view.slots, view)
        self.is_shared = policy.scope == "device"
        self.free_L = self.slots_L.copy()
        self.free = int(self.slots_L.sum())
        known_LE = np.zeros((L, E), np.int64) if history_LE is None else history_LE
        first_P = policy.first_P(self.slots_L, known_LE, view)
        self.coming: dict[int, Task] = {}
        self.stages: dict[int, Task] = {}
        self._is_early_P = np.zeros(L * E, np.bool_)  # prefetched, and not used yet
        self._locked_P = np.zeros(L * E, np.bool_)  # needed by the layer
        view.held_P[first_P] = True
        self.free -= len(first_P)
        np.subtract.at(self.free_L, first_P // E, 1)
        self.cache = policy.start(view, future_SLE > 0 if future_SLE is not None and policy.needs_future else None)

    @property
    def num_held(self) -> int:
        """Experts on the device or on their way to a slot."""
        return int(self.view.held_P.sum())

    def count(self, places: Ids) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Look up what a layer needs: which of them are here, and which are coming."""
        coming_N = self.view.coming_P[places]
        here_N = self.view.held_P[places] & ~coming_N
        num_early = int(self._is_early_P[places[here_N]].sum())
        if self.stages:
            staged = [self.stages.get(place) for place in places.tolist()]
            here_N |= np.array([copy is not None and copy.is_done for copy in staged])
            coming_N |= np.array([copy is not None and not copy.is_done for copy in staged])
            num_early += sum(copy is not None and copy.is_done for copy in staged)
        num_here, num_late = int(here_N.sum()), int(coming_N.sum())
        self._is_early_P[places] = False
        self.uses.prefetched += num_early
        self.uses.cached += num_here - num_early
        self.uses.late += num_late
        self.uses.missed += len(places) - num_here - num_late
        return here_N, coming_N

    def used(self) -> None:
        """The layer of the view has chosen: tell the policy, and lock what is needed."""
        self.cache.used(self.view)
        self._lock(True)

    def release(self) -> None:
        """The layer's experts may leave again."""
        self.view.mark_used()
        self._lock(False)

    def _lock(self, value: bool) -> None:
        self._locked_P[self.view.layer * self.view.num_experts + self.view.ids] = value

    def make_room(self, places: Sequence[int], spare: Sequence[int] = ()) -> int:
        """Give slots to places (of one layer, unless layers share them), the first things first.

        spare: places that do not leave for this.

        Returns:
            how many of them got one.
        """
        if not places:
            return 0
        view, E = self.view, self.view.num_experts
        layer = places[0] // E
        free = self.free if self.is_shared else int(self.free_L[layer])
        lacking = len(places) - free
        if lacking > 0:
            own = slice(None) if self.is_shared else slice(layer * E, (layer + 1) * E)
            offered = view.held_P[own] & ~self._locked_P[own] & ~self.view.coming_P[own]
            base = own.start or 0
            if len(spare):
                inside = np.asarray(spare) - base
                offered[inside[(inside >= 0) & (inside < len(offered))]] = False
            (ids,) = offered.nonzero()
            free += self._evict(base + ids, lacking)
        kept = places[: max(free, 0)]
        view.held_P[list(kept)] = True
        self.free -= len(kept)
        if not self.is_shared:
            self.free_L[layer] -= len(kept)
        return len(kept)

    def _evict(self, offered: Ids, most: int) -> int:
        """Drop the least worthy of the places; how many left."""
        if not len(offered):
            return 0
        worth = self.cache.worth(offered, self.view)
        if most == 1:
            least = worth.argmin()
            gone = [int(offered[least])] if worth[least] < np.inf else []
        else:
            order = np.argsort(worth, kind="stable")[:most]
            gone = offered[order[worth[order] < np.inf]].tolist()
        self._drop(gone)
        for place in gone:
            self.cache.left(place)
        return len(gone)

    def _drop(self, places: list[int]) -> None:
        """Of one layer, unless layers share the slots."""
        self.view.held_P[places] = self._is_early_P[places] = False
        self.free += len(places)
        if places and not self.is_shared:
            self.free_L[places[0] // self.view.num_experts] += len(places)

    def send(self, places: Sequence[int], copy: Task, is_early: bool) -> None:
        """A copy into slots was queued."""
        for place in places:
            self.coming[place] = copy
            self.view.coming_P[place] = True
            self._is_early_P[place] = is_early
        if is_early:
            self.num_prefetched += len(places)

    def stage(self, place: int, copy: Task) -> None:
        """A copy into a buffer was queued."""
        self.stages[place] = copy
        self.num_prefetched += 1

    def arrived(self, places: Iterable[int]) -> None:
        """A copy has ended."""
        for place in places:
            if self.coming.pop(place, None) is not None:
                self.view.coming_P[place] = False

    def give_up(self, places: Iterable[int]) -> None:
        """Queued copies will not be made."""
        for place in places:
            self.num_prefetched -= 1
            if self.stages.pop(place, None) is None and self.coming.pop(place, None) is not None:
                self.view.coming_P[place] = False
                self._drop([place])
