"""The graph of a machine: `[[links]]` patterns become a node's edges, and nodes join in a fat tree of rails.

A pattern is a kind of vertex and an index: `gpu0`, `gpu*` (each), `gpu{i}` (each, and the other end is named
after it: `nic{i}`, `pcie{i//2}`). Kinds are gpu (the devices), host, and whatever `[vertices]` counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import networkx as nx

from moesim.files.keys import nearest
from moesim.files.tables import Table
from moesim.hardware import Link

MAX_NODES_PER_LEAF = 32
"""Half of the 64 ports of a leaf switch; the other half goes up."""

_PATTERN = re.compile(r"([a-z]+)(\d+|\*|\{i\}|\{i//[1-9]\d*\})")


@dataclass(frozen=True)
class Network:
    """What joins nodes: the port of one NIC (and of a switch), and how many nodes share a leaf switch."""

    port: Link
    nodes_per_leaf: int = MAX_NODES_PER_LEAF


def _end(table: Table, key: str, counts: Mapping[str, int]) -> tuple[str, str] | None:
    """Kind and index of one end of a link, or None and a mistake."""
    given = table.text(key)
    match = _PATTERN.fullmatch(given)
    if not given:
        return None
    if match is None:
        table.blame(key, f"must be a kind and an index, as gpu0, gpu*, gpu{{i}} or pcie{{i//2}}, not {given!r}")
    elif match[1] not in counts:
        table.blame(key, f"is at the unknown vertex {given!r}; {nearest(match[1], counts)}, each with an index")
    elif match[2].isdigit() and int(match[2]) >= counts[match[1]] > 0:
        last = counts[match[1]] - 1
        table.blame(key, f"is at the unknown vertex {given!r}; the indices of {match[1]} go from 0 to {last}")
    else:
        return match[1], match[2]
    return None


def _pairs(table: Table, counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """The edges that one entry of `[[links]]` stands for."""
    start, end = _end(table, "from", counts), _end(table, "to", counts)
    if start is None or end is None:
        return []
    (kind, index), (end_kind, end_index) = start, end
    if "//" in index:
        table.blame("from", f"must not divide i, as {kind}{index} does; let `to` do so")
        return []
    if "i" in end_index and index != "{i}":
        table.blame("to", f"uses i, so `from` must be {kind}{{i}}, not {kind}{index}")
        return []
    if 0 in (counts[kind], counts[end_kind]):  # a count that is wrong itself, and was blamed for it
        return []
    pairs = []
    for i in [int(index)] if index.isdigit() else range(counts[kind]):
        ends = range(counts[end_kind]) if end_index == "*" else [i]
        if end_index.isdigit():
            ends = [int(end_index)]
        elif "//" in end_index:
            ends = [i // int(end_index[4:-1])]
        if max(ends) >= counts[end_kind]:
            last = counts[end_kind] - 1
            table.blame("to", f"leads to the unknown vertex {end_kind}{max(ends)}; {end_kind} goes from 0 to {last}")
            return []
        pairs += [(f"{kind}{i}", f"{end_kind}{j}") for j in ends if kind != end_kind or i != j]
    if kind == end_kind and index == end_index == "*":
        pairs = [(a, b) for a, b in pairs if int(a[len(kind) :]) < int(b[len(kind) :])]
    return pairs


def node_graph(top: Table, num_devices: int, num_hosts: int) -> nx.Graph:
    """One node, vertices without the prefix "n0/"."""
    vertices = top.table("vertices", required=False)
    counts = {"gpu": num_devices, "host": num_hosts}
    for kind in vertices.values:
        if re.fullmatch("[a-z]+", kind) and kind not in counts:
            counts[kind] = vertices.count(kind)
        else:
            vertices.blame(kind, "must be a new kind of vertex in small letters, such as nic, pcie or nvswitch")
    graph = nx.Graph()
    graph.add_nodes_from(f"{kind}{i}" for kind, count in counts.items() for i in range(count))
    before = len(top.mistakes)
    if "links" not in top.values:
        top.blame("links", 'is missing; give [[links]] entries, such as from = "gpu*", to = "host0"')
    for table in top.tables("links"):
        table.only(("from", "to", "bytes_per_s", "latency_s"))
        link = Link(table.number("bytes_per_s", example="64e9"), table.number("latency_s", example="0.5e-6"))
        for a, b in _pairs(table, counts):
            if graph.has_edge(a, b):
                table.blame("to", f"joins {a} and {b} a second time; give one link with the sum of their bandwidths")
                break
            graph.add_edge(a, b, link=link)
    if len(top.mistakes) == before and all(counts.values()):
        apart = sorted(set(graph) - nx.node_connected_component(graph, "gpu0"))
        if apart:
            top.blame("links", f"leave {', '.join(apart[:5])} without a path to gpu0; add a link to each such part")
    return graph


def joined(graph: nx.Graph, num_nodes: int, network: Network | None) -> nx.Graph:
    """`num_nodes` copies of a node; with several, their NICs in a rail-optimised fat tree.

    NIC i of every node goes to a leaf switch of rail i; as many ports of a leaf go up as down, spread over
    all spines, of which there are enough to take them (half as many as leaves; none for a single leaf).
    """
    whole = nx.Graph()
    for node in range(num_nodes):
        whole.add_nodes_from(f"n{node}/{vertex}" for vertex in graph)
        whole.add_edges_from((f"n{node}/{a}", f"n{node}/{b}", data) for a, b, data in graph.edges(data=True))
    if network is None or num_nodes == 1:
        return whole
    num_nics = sum(vertex.startswith("nic") for vertex in graph)
    leaves_per_rail = math.ceil(num_nodes / network.nodes_per_leaf)
    for node in range(num_nodes):
        for rail in range(num_nics):
            leaf = rail * leaves_per_rail + node // network.nodes_per_leaf
            whole.add_edge(f"n{node}/nic{rail}", f"leaf{leaf}", link=network.port)
    num_leaves = num_nics * leaves_per_rail
    num_spines = math.ceil(num_leaves / 2) if num_leaves > 1 else 0
    for spine in range(num_spines):
        bundle = Link(network.port.bytes_per_s * network.nodes_per_leaf / num_spines, network.port.latency_s)
        whole.add_edges_from((f"leaf{leaf}", f"spine{spine}", {"link": bundle}) for leaf in range(num_leaves))
    return whole
