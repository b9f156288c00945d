"""The operations of a forward iteration, layer by layer, for one batch or for two that overlap.

A batch's step is a row of *blocks* that end where its tokens leave: attention, router and dispatch; then shared and
routed experts, and combine. Two batches take turns on each stream, one a block behind the other, so that while the
tokens of one are on their way, the other one computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from moesim.program.operation import Draft


@dataclass
class Lowering:
    """Blocks that are filled layer by layer, then written into a draft.

    Attributes:
        is_cut: whether tensor parallelism cuts the matrices; is_spread: whether experts lie on several ranks.
        is_dealt: whether the tokens of a group are dealt out over ranks (context parallelism).
        rows: (name, batch) -> ids of its operations, one a layer.
    """

    draft: Draft
    num_batches: int
    is_cut: bool
    is_spread: bool
    is_dealt: bool = False
    rows: dict[tuple[str, int], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.after: list[tuple[int, ...]] = [()] * self.num_batches
        self._router = [0] * self.num_batches
        self._blocks: list[list[Callable[[int], None]]] = [[]]

    def attention(self, layer: int, halved: bool) -> None:
        """Attention; with tensor parallelism an all-reduce, or the first half of one."""
        if self.is_dealt:
            self._later("kv_exchange", layer, "network", "cp")
        self._later("attention", layer, "compute")
        if self.is_cut:
            self._later("reduce_scatter" if halved else "allreduce", layer, "network", "tp")

    def dense(self, layer: int) -> None:
        """A dense network."""
        self._later("dense", layer, "compute")
        if self.is_cut:
            self._later("allreduce", layer, "network", "tp")

    def head(self, layer: int) -> None:
        """The output head."""
        self._later("head", layer, "compute")

    def experts(self, layer: int, has_shared: bool) -> None:
        """Router and dispatch, then experts and their way back."""
        self._blocks[-1].append(lambda place: self._route(place, layer))
        self._blocks.append([lambda place: self._compute(place, layer, has_shared)])
        if self.is_spread:
            self._later("combine", layer, "network", "ep")
        if self.is_cut:
            self._later("all_gather" if self.is_spread else "allreduce", layer, "network", "tp")
        self._blocks.append([])

    def write(self) -> tuple[int, ...]:
        """Write all blocks; what comes after them waits for the operations returned."""
        last = len(self._blocks) + self.num_batches - 1
        for turn in range(last):
            for place in range(self.num_batches):
                if 0 <= turn - place < len(self._blocks):
                    for write in self._blocks[turn - place]:
                        write(place)
        return tuple(op for after in self.after for op in after)

    def _add(self, place: int, name: str, layer: int, resource: str, group: str = "rank") -> int:
        op = self.draft.add(name, layer, resource, group, self.after[place])
        self.rows.setdefault((name, place), []).append(op)
        self.after[place] = (op,)
        return op

    def _later(self, name: str, layer: int, resource: str, group: str = "rank") -> None:
        def write(place: int) -> None:
            self._add(place, name, layer, resource, group)

        self._blocks[-1].append(write)

    def _route(self, place: int, layer: int) -> None:
        self._router[place] = self._add(place, "router", layer, "compute")
        if self.is_spread:
            self._add(place, "dispatch", layer, "network", "ep")

    def _compute(self, place: int, layer: int, has_shared: bool) -> None:
        if has_shared:
            arrived, self.after[place] = self.after[place], (self._router[place],)
            self.after[place] = (*arrived, self._add(place, "shared_experts", layer, "compute"))
        self._add(place, "experts", layer, "compute")
