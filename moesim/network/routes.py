"""Routes of flows over the directed links of a topology."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from zlib import crc32

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from moesim.hardware import Cluster, Link

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_SLOWNESS = 1e6
"""Of a path: a byte per second costs so many hops; too little to outweigh a hop above 1 GB/s."""


@dataclass(frozen=True, eq=False)
class Routes:
    """The links that each of F flows crosses, as one array with starts (CSR), and the other way round.

    Attributes:
        start_F: where each flow's links begin in `link_X`; its last entry is their number, [F + 1].
        link_X: index of the links, flow after flow, in the order in which they are crossed.
        num_links: K.
    """

    start_F: Ints
    link_X: Ints
    num_links: int

    @property
    def num_flows(self) -> int:
        """F."""
        return len(self.start_F) - 1

    @cached_property
    def flows_of(self) -> tuple[Ints, Ints]:
        """For each link the flows that cross it: starts [K + 1], flows [X]."""
        flow_X = np.repeat(np.arange(self.num_flows), np.diff(self.start_F))
        count_K = np.bincount(self.link_X, minlength=self.num_links)
        return np.concatenate([[0], np.cumsum(count_K)]), flow_X[np.argsort(self.link_X, kind="stable")]

    def sum_over(self, value_K: Floats) -> Floats:
        """Sum of a link's value along each flow, [F]: of latencies, say."""
        total_X = np.concatenate([[0.0], np.cumsum(value_K[self.link_X])])
        return np.asarray(total_X[self.start_F[1:]] - total_X[self.start_F[:-1]])

    def load(self, amount_F: Floats) -> Floats:
        """Sum of the flows' amounts on each link, [K]: of bytes, say."""
        weight_X = np.repeat(amount_F, np.diff(self.start_F))
        return np.bincount(self.link_X, weight_X, self.num_links).astype(np.float64)


def _kind(vertex: str) -> str:
    return vertex.rpartition("/")[2].rstrip("0123456789")


@dataclass(frozen=True, eq=False)
class Fabric:
    """The directed links of a cluster: two for each edge, so that both directions of a link run at full rate.

    A flow takes the fewest hops, the fastest of several such paths; where paths are alike in that too (spines), one by
    a hash of its two ends and `seed`, as switches do (ECMP). A GPU passes on to its NIC what others of its node send
    (NCCL's PXN), but not to others what its NIC receives, unless there is no other way.

    Attributes:
        slowed: (from, to) -> fraction of its bandwidth that a link, in both directions, still has; 0 for a link that
            is down. A vertex in place of a pair means all of its links.
        seed: of the choice among like paths.

    Raises:
        ValueError: a link or vertex that the topology has not, a fraction outside of 0 to 1, or a link without
            bandwidth.
    """

    cluster: Cluster
    slowed: dict[tuple[str, str] | str, float] = field(default_factory=dict)
    seed: int = 0
    _known: dict[bytes, Routes] = field(default_factory=dict, repr=False)
    _path_of: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        graph, said = self.cluster.topology, f"cluster {self.cluster.name!r}"
        for name, fraction in self.slowed.items():
            known = graph.has_node(name) if isinstance(name, str) else graph.has_edge(*name)
            if not known:
                what = name if isinstance(name, str) else " - ".join(name)
                raise ValueError(f"{said}: no {what} in its topology; slow a link or a part that it has")
            if not 0 <= fraction <= 1:
                raise ValueError(f"{said}: {name} must keep 0 to 1 of its bandwidth, given {fraction}")
        for a, b, data in graph.edges(data=True):
            if not data["link"].bytes_per_s > 0:
                raise ValueError(f"{said}: the link {a} - {b} has no bandwidth; give one above 0, or leave it out")

    @cached_property
    def _links(self) -> dict[tuple[str, str], Link]:
        """Directed links that are up."""
        found = {}
        for a, b, data in self.cluster.topology.edges(data=True):
            link: Link = data["link"]
            kept = min(self.slowed.get(name, 1.0) for name in (a, b, (a, b), (b, a)))
            if kept > 0:
                found[a, b] = found[b, a] = Link(link.bytes_per_s * kept, link.latency_s)
        return found

    @cached_property
    def index(self) -> dict[tuple[str, str], int]:
        """Directed link, named by its ends -> its place in the arrays."""
        return {ends: place for place, ends in enumerate(self._links)}

    @cached_property
    def bytes_per_s_K(self) -> Floats:
        """Bandwidth of each directed link."""
        return np.array([link.bytes_per_s for link in self._links.values()])

    @cached_property
    def latency_s_K(self) -> Floats:
        """Latency of each directed link."""
        return np.array([link.latency_s for link in self._links.values()])

    @cached_property
    def _up(self) -> nx.Graph:
        graph = nx.Graph()
        graph.add_nodes_from(self.cluster.topology)
        graph.add_weighted_edges_from(
            (a, b, 1.0 + _SLOWNESS / link.bytes_per_s) for (a, b), link in self._links.items()
        )
        return graph

    @cached_property
    def _next_hops(self) -> dict[tuple[str, bool], dict[str, list[str]]]:
        """Destination, and whether NICs may send through other GPUs -> vertex -> where it may go next."""
        return {}

    def _towards(self, end: str, through: bool = False) -> dict[str, list[str]]:
        if (end, through) not in self._next_hops:

            def cost(near: str, far: str, data: dict[str, float]) -> float | None:
                """Of the link from the farther vertex to the nearer one; None forbids it."""
                passes = near != end and _kind(near) == "gpu" and _kind(far) not in ("gpu", "nvswitch")
                return None if passes and not through else data["weight"]

            away = nx.single_source_dijkstra_path_length(self._up, end, weight=cost)
            hops: dict[str, list[str]] = {vertex: [] for vertex in away}
            for vertex, distance in away.items():
                for other in sorted(self._up[vertex]):
                    step = cost(other, vertex, self._up[vertex][other])
                    if step is not None and other in away and abs(away[other] + step - distance) < 1e-9:
                        hops[vertex].append(other)
            self._next_hops[end, through] = hops
        return self._next_hops[end, through]

    def path(self, start: str, end: str) -> list[int]:
        """The links from one vertex to another.

        Raises:
            ValueError: there is no way.
        """
        towards = self._towards(end)
        if start not in towards:
            towards = self._towards(end, through=True)
        if start not in towards:
            raise ValueError(f"cluster {self.cluster.name!r}: no path from {start} to {end} in its topology")
        links, here, turn = [], start, crc32(f"{start} {end} {self.seed}".encode())
        while here != end:
            choice = towards[here]
            there = choice[turn % len(choice)]
            links.append(self.index[here, there])
            here, turn = there, turn // 7 + len(links)
        return links

    def vertex(self, place: int) -> str:
        """The vertex of a rank, 0 to R - 1, or of the switch of node n, R + n.

        Raises:
            ValueError: the cluster has no such rank or node, or no vertex joins all devices of the node.
        """
        cluster = self.cluster
        if 0 <= place < cluster.num_ranks:
            return cluster.vertex(place)
        node = place - cluster.num_ranks
        if not 0 <= node < cluster.num_nodes:
            raise ValueError(f"cluster {cluster.name!r}: no rank {place}; it has 0 to {cluster.num_ranks - 1}")
        devices = [cluster.vertex(node * cluster.devices_per_node + i) for i in range(cluster.devices_per_node)]
        joins = set.intersection(*(set(cluster.topology[device]) for device in devices))
        switches: list[str] = [vertex for vertex in joins if "switch" in _kind(vertex)]
        if not switches:
            raise ValueError(f"cluster {cluster.name!r}: no switch joins the devices of node {node}; take another way")
        return min(switches)

    def routes(self, source_F: Sequence[int] | Ints, target_F: Sequence[int] | Ints) -> Routes:
        """Routes of flows between ranks (or switches, see `vertex`); remembered.

        Raises:
            ValueError: a rank that the cluster has not, or two without a path.
        """
        source_F, target_F = np.asarray(source_F, np.int64), np.asarray(target_F, np.int64)
        key = source_F.tobytes() + target_F.tobytes()
        if key not in self._known:
            vertex = {int(place): self.vertex(int(place)) for place in np.unique([source_F, target_F])}
            ends = zip(source_F.tolist(), target_F.tolist(), strict=True)
            paths = [self._path_of.get(pair) or self._keep(*pair, vertex) for pair in ends]
            start_F = np.concatenate([[0], np.cumsum([len(path) for path in paths])]).astype(np.int64)
            link_X = np.fromiter((link for path in paths for link in path), np.int64, int(start_F[-1]))
            self._known[key] = Routes(start_F, link_X, len(self._links))
        return self._known[key]

    def _keep(self, a: int, b: int, vertex: Mapping[int, str]) -> tuple[int, ...]:
        self._path_of[a, b] = tuple(self.path(vertex[a], vertex[b]))
        return self._path_of[a, b]
