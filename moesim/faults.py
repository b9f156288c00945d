"""What is wrong with a machine: slow devices, slow or dead links."""

from __future__ import annotations

from collections.abc import Mapping
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
