"""Devices, nodes and clusters from their TOML files: a machine is a name, "18 x name", or a path.

A node is a topology of devices; several equal ones are joined by their NICs. All mistakes of the files behind
an expression are raised together.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import networkx as nx

from moesim.files.keys import nearest
from moesim.files.tables import Table, raise_all, read_table
from moesim.files.topology import MAX_NODES_PER_LEAF, Network, joined, node_graph
from moesim.hardware import SOURCES, Cluster, Device, Efficiency, Link, MemoryTier

KINDS = ("gpu", "npu", "cpu", "disk", "expander", "near_data")
COMPUTING = ("gpu", "npu", "cpu", "near_data")
FORMATS = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp6", "fp4", "int8", "int4")
WORK = ("gemm", "grouped_gemm", "attention", "memory", "network")
DEFAULT_HOST = "xeon-platinum-8480c"
DEFAULT_HOST_LINK = Link(32e9, 1e-6)
"""A bare GPU is taken to sit in such a host, on PCIe 4.0 x16."""

NODE_KEYS = (
    "device",
    "num_devices",
    "host",
    "num_hosts",
    "host_memory_bytes",
    "near",
    "disk",
    "vertices",
    "links",
    "network",
)
DEVICE_KEYS = ("kind", "launch_s", "power_w", "memory", "flops_per_s", "efficiency", "energy_j", "sources")


def _efficiency(table: Table, key: str) -> Efficiency:
    entry = table.table(key)
    entry.only(("value", "low", "high", "source", "note"))
    before = len(table.mistakes)
    value, low, high = (entry.number(name, example="0.7") for name in ("value", "low", "high"))
    if len(table.mistakes) == before and not low <= value <= high <= 1:
        given = f"low {low}, value {value}, high {high}"
        table.blame(key, f"must keep 0 < low <= value <= high <= 1, not {given}; give fractions of the peak")
    source = entry.text("source", SOURCES)
    return Efficiency(value, low, high, source, str(entry.values.get("note", "")))


def _device(name: str, top: Table) -> Device:
    top.only(DEVICE_KEYS)
    kind = top.text("kind", KINDS)
    computes = kind in COMPUTING
    memory = top.table("memory")
    memory.only(("capacity_bytes", "bytes_per_s", "latency_s"))
    tier = MemoryTier(
        memory.number("capacity_bytes", example="85.9e9"),
        memory.number("bytes_per_s"),
        memory.number("latency_s", example="700e-9"),
    )
    flops = top.table("flops_per_s", required=computes)
    flops.only(FORMATS)
    if computes and not flops.values and isinstance(top.values.get("flops_per_s"), dict):
        top.blame("flops_per_s", f"must have a format that a {kind} computes in, such as bf16 = 989e12")
    work = top.table("efficiency")
    work.only(WORK)
    kinds_of_work = [key for key in WORK if key in work.values or computes or key == "memory"]
    launch_s = top.number("launch_s", default=None if computes else 0.0, example="3e-6")
    energy = top.table("energy_j", required=False)
    energy.only(("byte", "flop"))
    groups = [
        "memory",
        *(["energy"] if energy.values else []),
        *(["flops"] if flops.values else []),
        *(["launch"] if "launch_s" in top.values else []),
    ]
    return Device(
        name=name,
        kind=kind,
        memory=tier,
        flops_per_s={form: flops.number(form) for form in flops.values if form in FORMATS},
        launch_s=launch_s,
        power_w=top.number("power_w", example="700.0"),
        efficiency={key: _efficiency(work, key) for key in kinds_of_work},
        energy_j={of: energy.number(of, example="28e-12") for of in energy.values if of in ("byte", "flop")},
        sources=top.source_of([*groups, "power", "efficiency"]),
    )


def _shipped(folder: str) -> dict[str, Traversable]:
    found = files("moesim.hwprofiles").joinpath(folder).iterdir()
    return {f.name.removesuffix(".toml"): f for f in found if f.name.endswith(".toml")}


def device_names() -> list[str]:
    """The devices that come with the package."""
    return sorted(_shipped("devices"))


def hardware_names() -> list[str]:
    """The nodes that come with the package; `load_cluster` takes each of them."""
    return sorted(_shipped("nodes"))


def _is_path(name: str) -> bool:
    return name.endswith(".toml") or "/" in name or (name != "" and Path(name).is_dir())


def _find_device(name: str, beside: Path, blame_as: str, mistakes: list[str]) -> Device | None:
    shipped = _shipped("devices")
    if name in shipped:
        where, source, short = f"{name}.toml", shipped[name], name
    elif _is_path(name):
        where, source, short = str(beside / name), beside / name, Path(name).stem
    else:
        mistakes.append(f"{blame_as} names the unknown device {name!r}; {nearest(name, shipped)}")
        return None
    top = read_table(where, source, mistakes)
    return _device(short, top) if top else None


def load_device(name: str) -> Device:
    """A device by its name or the path of its TOML file.

    Raises:
        ValueError: lists every mistake of the file.
    """
    mistakes: list[str] = []
    device = _find_device(name, Path(), "the call", mistakes)
    raise_all(f"device {name!r}", mistakes)
    assert device is not None
    return device


def _parse(expression: str, mistakes: list[str]) -> tuple[int, str]:
    """Split "18 x hgx-h100" into the number of nodes and the name."""
    whole = expression.strip()
    match = re.fullmatch(r"(?P<n>[+-]?[\d.]+|[^\s/]+(?=\s))\s*[xX]\s+(?P<name>.+)", whole)
    if match is None or Path(whole).is_file():
        return 1, whole
    given, name = match["n"], match["name"].strip()
    if re.fullmatch(r"[0-9]+", given) and int(given) >= 1:
        return int(given), name
    rule = f"the number of nodes must be a whole number, at least 1, as in '18 x {name}'"
    mistakes.append(f"{rule}, not {given!r}")
    return 1, name


def _bare(device: Device) -> Cluster:
    graph = nx.Graph()
    graph.add_node("n0/gpu0")
    host = load_device(DEFAULT_HOST) if device.kind in ("gpu", "npu") else None
    if host is not None:
        graph.add_edge("n0/gpu0", "n0/host0", link=DEFAULT_HOST_LINK)
    sources = {"links": "assumed: a bare device sits on PCIe 4.0 x16"} if host else {}
    return Cluster(device.name, device, 1, 1, graph, host, 1 if host else 0, sources=sources)


def _part(top: Table, key: str, kinds: tuple[str, ...], beside: Path) -> Device | None:
    """The device that a node's file names under `key`."""
    name = top.text(key)
    found = _find_device(name, beside, f"{top.where}: {key}", top.mistakes) if name else None
    if found is not None and found.kind and found.kind not in kinds:
        top.blame(key, f"must be of kind {' or '.join(kinds)}, not {name!r}, which is of kind {found.kind}")
    return found


def _network(top: Table, num_nodes: int, has_nics: bool) -> Network | None:
    if "network" not in top.values:
        if has_nics:
            top.blame("network", "is missing, but the node has NICs; give a table [network] with bytes_per_s")
        elif num_nodes > 1:
            top.blame(
                "network",
                f"is missing and there are no NICs, so {num_nodes} nodes cannot be joined; ask for 1, or add NICs",
            )
        return None
    if not has_nics:
        top.blame("network", "is given, but the node has no NICs; give [vertices] nic = N and links to them")
    table = top.table("network")
    table.only(("bytes_per_s", "latency_s", "nodes_per_leaf"))
    port = Link(table.number("bytes_per_s", example="50e9"), table.number("latency_s", example="0.7e-6"))
    return Network(port, table.count("nodes_per_leaf", MAX_NODES_PER_LEAF))


def _node(full: str, num_nodes: int, top: Table, beside: Path) -> Cluster | None:
    top.only((*NODE_KEYS, "sources"))
    num_devices, num_hosts = top.count("num_devices"), top.count("num_hosts")
    device = _part(top, "device", COMPUTING, beside)
    host = _part(top, "host", ("cpu",), beside)
    if host is not None and "host_memory_bytes" in top.values:
        host = replace(host, memory=replace(host.memory, capacity_bytes=top.number("host_memory_bytes")))
    near = _part(top, "near", ("near_data",), beside) if "near" in top.values else None
    disk = _part(top, "disk", ("disk",), beside) if "disk" in top.values else None
    graph = node_graph(top, num_devices, num_hosts)
    network = _network(top, num_nodes, has_nics=any(vertex.startswith("nic") for vertex in graph))
    given = {"links": "links", "network": "network", "host_memory": "host_memory_bytes"}
    sources = top.source_of([group for group, key in given.items() if key in top.values])
    if device is None or host is None or top.mistakes:
        return None
    topology = joined(graph, num_nodes, network)
    return Cluster(full, device, num_nodes, num_devices, topology, host, num_hosts, near, disk, sources)


def load_cluster(expression: str) -> Cluster:
    """A machine: a node by name or path ("hgx-h100", "my/box.toml"), "18 x hgx-h100", or a bare device.

    Several nodes are joined by a rail-optimised fat tree: NIC i of every node on the leaf switches of rail i.
    "48 of gb200-nvl72" is one node of which so many devices, the first ones, are used.

    Raises:
        ValueError: lists every mistake of the expression and the files behind it.
    """
    mistakes: list[str] = []
    part = re.fullmatch(r"(?P<n>\d+)\s+of\s+(?P<node>\S+)", expression.strip())
    if part:
        return _first(load_cluster(part["node"]), int(part["n"]))
    num_nodes, name = _parse(expression, mistakes)
    nodes, devices = _shipped("nodes"), device_names()
    cluster = None
    if name in nodes or (name not in devices and _is_path(name)):
        path = Path() if name in nodes else Path(name)
        where, source = (f"{name}.toml", nodes[name]) if name in nodes else (name, path)
        short = name if name in nodes else path.stem
        top = read_table(where, source, mistakes)
        if top is not None:
            full = short if num_nodes == 1 else f"{num_nodes} x {short}"
            cluster = _node(full, num_nodes, top, path.parent)
    elif name not in devices:
        mistakes.append(f"no node or device is called {name!r}; {nearest(name, [*nodes, *devices])}")
    elif num_nodes > 1:
        known = ", ".join(sorted(nodes))
        mistakes.append(f"the bare device {name!r} has no NICs to join {num_nodes}; name a node: {known}")
    else:
        cluster = _bare(load_device(name))
    raise_all(f"hardware {expression!r}", mistakes)
    assert cluster is not None
    return cluster


def _first(whole: Cluster, num_devices: int) -> Cluster:
    if not 1 <= num_devices <= whole.devices_per_node:
        raise ValueError(
            f"hardware: {whole.name!r} has {whole.devices_per_node} devices, of which 1 to {whole.devices_per_node} "
            f"can be used, given {num_devices}"
        )
    return replace(whole, name=f"{num_devices} of {whole.name}", devices_per_node=num_devices)
