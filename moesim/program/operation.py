"""The program: one step of a model on a layout as operations that wait for each other.

An `Operation` runs on the ranks of its groups. A *group* is a set of ranks that start it together: every rank alone for
computation, all ranks of an expert-parallel group for a dispatch, a sender and a receiver for a transfer between
pipeline stages. It starts in a group when, on each member, everything it waits for there has finished. Streams run in
order because the lowering adds the stream's previous operation to what the next one waits for; so a resource that only
one rank uses never queues, and only resources named in `Program.shared` need a queue at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Operation:
    """One thing that takes time.

    Attributes:
        name: part of the step, as in the breakdown: "attention", "dispatch", "experts", ...
        layer: index in the model, -1 outside the layers.
        resource: stream of each rank ("compute", "network", "h2d"), or a key of `Program.shared`.
        group: key of `Program.groups`.
        after: ids of the operations it waits for, rank by rank.
    """

    name: str
    layer: int
    resource: str
    group: str
    after: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """N operations over R ranks, in an order in which nothing waits for a later one.

    groups: name -> int32 [R], the group each rank belongs to, -1 for a rank that takes no part.
    shared: resources that several ranks use, name -> how many operations it can serve at once.
    """

    operations: tuple[Operation, ...]
    num_ranks: int
    groups: Mapping[str, NDArray[np.int32]]
    shared: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_static(self) -> bool:
        """Whether nothing can race: no shared resource."""
        return not self.shared

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of the step."""
        return part_names(self.operations)

    @cached_property
    def part_N(self) -> NDArray[np.int32]:
        """Index in `parts` of each operation."""
        return part_indices(self.operations, self.parts)

    @cached_property
    def group_NR(self) -> NDArray[np.int32]:
        """Group that each rank belongs to in each operation, -1 for none."""
        return np.stack([self.groups[op.group] for op in self.operations])

    @cached_property
    def is_alone_N(self) -> NDArray[np.bool_]:
        """Whether each rank starts the operation for itself."""
        return np.asarray((self.group_NR == np.arange(self.num_ranks)).all(axis=1))

    @cached_property
    def waits(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """What operation n waits for: entries start[n] to start[n + 1] of the second array."""
        starts = np.cumsum([0, *(len(op.after) for op in self.operations)])
        return starts.astype(np.int32), np.array([a for op in self.operations for a in op.after], np.int32)

    @cached_property
    def members(self) -> Mapping[str, tuple[NDArray[np.int64], ...]]:
        """Ranks of each group of each kind: those that start an operation together."""
        return {
            name: tuple(np.flatnonzero(group_R == g) for g in np.unique(group_R[group_R >= 0]))
            for name, group_R in self.groups.items()
        }


def part_names(operations: Sequence[Operation]) -> tuple[str, ...]:
    """Names of the parts of a step, in the order of their first operation."""
    return tuple(dict.fromkeys(op.name for op in operations))


def part_indices(operations: Sequence[Operation], parts: Sequence[str]) -> NDArray[np.int32]:
    """Index in `parts` of each operation."""
    index = {name: i for i, name in enumerate(parts)}
    return np.array([index[op.name] for op in operations], np.int32)


@dataclass(frozen=True, eq=False)
class Costs:
    """What one step of a program costs: arrays over its operations.

    seconds_NR float64 [N, R] and bytes_NR float64 [N, R] (0 where a rank takes no part), and
    shares_NX float64 [N, 4], the share of the operation's time that rests on each of `moesim.hardware.SOURCES`.
    """

    seconds_NR: NDArray[np.float64]
    bytes_NR: NDArray[np.float64]
    shares_NX: NDArray[np.float64]

    def copy(self) -> Costs:
        """The same in arrays of its own."""
        return Costs(self.seconds_NR.copy(), self.bytes_NR.copy(), self.shares_NX.copy())


@dataclass(frozen=True, eq=False)
class Played:
    """A step after it ran: its operations with start and finish.

    start_NR, finish_NR: float64 [N, R] seconds from the start of the step, 0 where a rank takes no part.
    """

    operations: tuple[Operation, ...]
    costs: Costs
    start_NR: NDArray[np.float64]
    finish_NR: NDArray[np.float64]
    parts: tuple[str, ...]
    part_N: NDArray[np.int32]

    @cached_property
    def seconds(self) -> float:
        """From the start to the last finish on any rank."""
        return float(self.finish_NR.max(initial=0.0))


class Draft:
    """A program being written: streams stay in order by themselves."""

    def __init__(self, num_ranks: int, groups: Mapping[str, NDArray[np.int32]]) -> None:
        self.operations: list[Operation] = []
        self.num_ranks = num_ranks
        self.groups = {"rank": np.arange(num_ranks, dtype=np.int32), **groups}
        self._last: dict[str, int] = {}

    def add(self, name: str, layer: int, resource: str, group: str = "rank", after: Sequence[int] = ()) -> int:
        """Append an operation after the last one of its stream, and return its id."""
        stream = [self._last[resource]] if resource in self._last else []
        waits = tuple(dict.fromkeys([*stream, *after]))
        self.operations.append(Operation(name, layer, resource, group, waits))
        self._last[resource] = len(self.operations) - 1
        return len(self.operations) - 1

    def program(self, shared: Mapping[str, int] | None = None) -> Program:
        """The finished program."""
        return Program(tuple(self.operations), self.num_ranks, self.groups, shared or {})
