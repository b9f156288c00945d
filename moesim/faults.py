"""What is wrong with a machine: slow devices, slow or dead links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.hardware import Cluster
from moesim.network.routes import Fabric


@dataclass(frozen=True)
class Faults:
    """Parts of a machine that are slower than they should be.

    Attributes:
        devices: rank, as text -> share of its speed that it computes at, above 0 to 1.
        links: a link "n0/gpu0 - n0/nic0", or a part "n0/nic0" for all its links -> share of its bandwidth that is
            left; 0 where it is down.
    """

    devices: dict[str, float] = field(default_factory=dict)
    links: dict[str, float] = field(default_factory=dict)

    def slowdown_R(self, num_ranks: int) -> NDArray[np.float64] | None:
        """Factor on each rank's computation; None where none is slow."""
        if not self.devices:
            return None
        found_R = np.ones(num_ranks)
        for rank, speed in self.devices.items():
            found_R[int(rank)] = 1 / speed
        return found_R

    @property
    def slowed(self) -> Mapping[tuple[str, str] | str, float]:
        """The links as `Fabric` takes them."""
        named = {name: tuple(part.strip() for part in name.split(" - ")) for name in self.links}
        return {(ends[0], ends[1]) if len(ends) == 2 else name: self.links[name] for name, ends in named.items()}

    def mistakes(self, cluster: Cluster) -> list[str]:
        """What the machine has not, or no fault can be: one sentence each."""
        found = []
        for rank, speed in self.devices.items():
            if not rank.isdigit() or int(rank) >= cluster.num_ranks:
                found.append(
                    f"faults.devices: {rank!r} is not a rank of {cluster.name}; 0 to {cluster.num_ranks - 1} would do"
                )
            if not isinstance(speed, int | float) or not 0 < speed <= 1:
                found.append(
                    f"faults.devices: rank {rank} must keep a share of its speed above 0 to 1, given {speed!r}"
                )
        wrong = [name for name, share in self.links.items() if not isinstance(share, int | float)]
        found += [
            f"faults.links: {name} must keep a share of its bandwidth, 0 to 1, given {self.links[name]!r}"
            for name in wrong
        ]
        if not wrong:
            try:
                Fabric(cluster, dict(self.slowed))
            except ValueError as error:
                found.append(f"faults.links: {error}")
        return found


@dataclass(frozen=True)
class ServingFault:
    """Something that goes wrong in a fleet while it serves, from a time on for a while.

    Attributes:
        kind: "down", the instance loses all its requests, which go back to the router; "slow", a rank of it computes
            slower.
        instance: which one.
        start_s, duration_s: from when, and for how long; a duration of infinity never ends.
        rank: of the instance, for "slow".
        factor: how many times as long the rank's computation takes, for "slow", above 1.
    """

    kind: str
    instance: int
    start_s: float
    duration_s: float
    rank: int = 0
    factor: float = 1.0

    @property
    def end_s(self) -> float:
        """When it is over."""
        return self.start_s + self.duration_s

    def mistakes(self, num_instances: int, num_ranks: int) -> list[str]:
        """What the fleet, of instances of so many ranks, has not, or no fault can be: one sentence each."""
        found = []
        if self.kind not in ("down", "slow"):
            found.append(f"kind must be 'down' or 'slow', given {self.kind!r}")
        if not 0 <= self.instance < num_instances:
            found.append(f"no instance {self.instance}; 0 to {num_instances - 1} would do")
        if not 0 <= self.start_s < float("inf"):
            found.append(f"start_s must be 0 or more seconds, given {self.start_s}")
        if not self.duration_s > 0:
            found.append(f"duration_s must be above 0 seconds, given {self.duration_s}")
        if self.kind == "slow" and not 1 < self.factor < float("inf"):
            found.append(f"factor must be above 1, given {self.factor}; 2 takes twice as long")
        if self.kind == "slow" and not 0 <= self.rank < num_ranks:
            found.append(f"no rank {self.rank} in an instance; 0 to {num_ranks - 1} would do")
        if self.kind == "down" and (self.factor != 1 or self.rank != 0):
            found.append("rank and factor are of a slow rank; an instance that is down has neither")
        return [f"fleet.faults: {mistake}" for mistake in found]


def overlapping(faults: Sequence[ServingFault]) -> list[str]:
    """Faults that would begin while one of their kind and place still lasts: one sentence each."""
    found = []
    last: dict[tuple[str, int, int], ServingFault] = {}
    for fault in sorted(faults, key=lambda fault: fault.start_s):
        place = (fault.kind, fault.instance, fault.rank)
        if place in last and fault.start_s < last[place].end_s:
            found.append(
                f"fleet.faults: instance {fault.instance} is {fault.kind} from {fault.start_s} s, but still so from"
                f" {last[place].start_s} s; make one fault of the two"
            )
        last[place] = fault
    return found
