"""Machines: devices with their memory, links, and clusters whose topology is a graph.

Units: bytes, seconds, FLOP (a multiply-add is 2), watts. Peaks are dense. Bandwidths are per direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import inf

import networkx as nx

SOURCES = ("measured", "fitted", "datasheet", "assumed")
"""Where a number comes from, best first. A time made of several has the last of its parts."""


@dataclass(frozen=True)
class Efficiency:
    """Fraction of a peak that real code reaches: a value and the range it is believed to lie in."""

    value: float
    low: float
    high: float
    source: str = "assumed"
    note: str = ""


@dataclass(frozen=True)
class MemoryTier:
    """One level of memory."""

    capacity_bytes: float
    bytes_per_s: float
    latency_s: float = 0.0


@dataclass(frozen=True)
class Device:
    """A GPU, NPU, CPU socket, disk, memory expander, or a near-data unit: logic beside a memory that it reads.

    Attributes:
        flops_per_s: dense peak by arithmetic format ("bf16", "fp8", "int8", ...); empty where a device only
            stores.
        launch_s: time to start one kernel that follows another in a stream (or a captured graph).
        efficiency: achieved fraction by kind of work: "gemm", "grouped_gemm", "attention", "memory",
            "network".
        energy_j: "byte": joules of reading one from this memory, to where it is computed with; "flop": of one there.
        sources: for each group of numbers, "datasheet: ...", "measured: ..." or "assumed: ...".
    """

    name: str
    kind: str
    memory: MemoryTier
    flops_per_s: Mapping[str, float] = field(default_factory=dict)
    launch_s: float = 0.0
    power_w: float = 0.0
    efficiency: Mapping[str, Efficiency] = field(default_factory=dict)
    energy_j: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Link:
    """A connection, or a whole path: bytes per second in one direction, and seconds for the first byte."""

    bytes_per_s: float
    latency_s: float


def _hop(start: str, end: str, data: Mapping[str, Link]) -> float:
    """A path's length in hops; slowness only breaks ties."""
    return 1.0 + 1.0 / data["link"].bytes_per_s


@dataclass(frozen=True, eq=False)
class Cluster:
    """Equal nodes, joined by a network. Ranks are its devices, node after node.

    Attributes:
        topology: vertices "n0/gpu0", "n0/nvswitch0", "n0/host0", "n0/nic0", "leaf0", "spine0", ...; each edge
            has the attribute `link`, a `Link`.
        host: the CPU socket type, or None for a bare device.
        num_hosts: sockets per node.
        near: logic beside a memory: the device's own, or, where experts are offloaded, the one that holds them.
        disk: of a node, which holds the experts that fit in no memory.
    """

    name: str
    device: Device
    num_nodes: int
    devices_per_node: int
    topology: nx.Graph
    host: Device | None = None
    num_hosts: int = 0
    near: Device | None = None
    disk: Device | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        """R: all devices."""
        return self.num_nodes * self.devices_per_node

    @property
    def host_memory_bytes(self) -> float:
        """Of all sockets of a node; 0 where there is no host."""
        return self.host.memory.capacity_bytes * max(self.num_hosts, 1) if self.host else 0.0

    def vertex(self, rank: int) -> str:
        """Name of the rank's device in the topology."""
        node, index = divmod(rank, self.devices_per_node)
        return f"n{node}/gpu{index}"

    def path(self, start: str, end: str) -> Link:
        """The path with the fewest hops, the fastest of several: narrowest bandwidth, summed latency.

        Raises:
            ValueError: no path joins the two.
        """
        try:
            vertices = nx.shortest_path(self.topology, start, end, weight=_hop)
        except (nx.NetworkXNoPath, nx.NodeNotFound):
            raise ValueError(f"cluster {self.name!r}: no path from {start} to {end} in its topology") from None
        return self._along(vertices)

    def _along(self, vertices: Sequence[str]) -> Link:
        links = [self.topology.edges[a, b]["link"] for a, b in pairwise(vertices)]
        return Link(min((x.bytes_per_s for x in links), default=inf), sum(x.latency_s for x in links))

    @cached_property
    def scale_up(self) -> Link:
        """From a device to the others of its node, sent to all at once (to itself where it is the only one).

        Behind a switch this is its one link. Where devices are joined directly, its links add up: bandwidth
        is the sum, over the first links of its paths, of the narrowest place of the best path. Latency is the
        longest path's.
        """
        if self.devices_per_node == 1:
            return Link(self.device.memory.bytes_per_s, 0.0)
        node = self.topology.subgraph(vertex for vertex in self.topology if vertex.startswith("n0/"))
        paths = nx.single_source_dijkstra_path(node, self.vertex(0), weight=_hop)
        best: dict[str, float] = {}
        latency_s = 0.0
        for rank in range(1, self.devices_per_node):
            path = paths[self.vertex(rank)]
            link = self._along(path)
            best[path[1]] = max(best.get(path[1], 0.0), link.bytes_per_s)
            latency_s = max(latency_s, link.latency_s)
        return Link(sum(best.values()), latency_s)

    @cached_property
    def scale_out(self) -> Link:
        """Between devices of equal index in two nodes (the scale-up link where there is one node)."""
        if self.num_nodes == 1:
            return self.scale_up
        return self.path(self.vertex(0), self.vertex(self.devices_per_node))

    @cached_property
    def host_link(self) -> Link:
        """Between a device and its host's memory."""
        return self.path(self.vertex(0), "n0/host0")
