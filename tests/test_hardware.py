"""Machines: what ships with the package is sound, clusters add up, a bad file is told all its mistakes."""

from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.files.hardware import device_names, hardware_names, load_cluster, load_device
from moesim.hardware import SOURCES, Cluster, Link

NODE = """
device = "l4"
num_devices = 2
host = "xeon-gold-6330"
num_hosts = 1
[vertices]
nic = 2
[[links]]
from = "gpu*"
to = "host0"
bytes_per_s = 32e9
latency_s = 1e-6
[[links]]
from = "gpu{i}"
to = "nic{i}"
bytes_per_s = 32e9
latency_s = 1e-6
[network]
bytes_per_s = 12.5e9
latency_s = 1e-6
[sources]
links = "datasheet: a sheet"
network = "assumed: a guess"
"""
DEVICE = """
kind = "gpu"
launch_s = 3e-6
power_w = 100
[memory]
capacity_bytes = 24e9
bytes_per_s = 1e12
latency_s = 5e-7
[flops_per_s]
bf16 = 100e12
[efficiency]
gemm = { value = 0.7, low = 0.5, high = 0.8, source = "assumed" }
grouped_gemm = { value = 0.7, low = 0.5, high = 0.8, source = "assumed" }
attention = { value = 0.7, low = 0.5, high = 0.8, source = "assumed" }
memory = { value = 0.7, low = 0.5, high = 0.8, source = "assumed" }
network = { value = 0.7, low = 0.5, high = 0.8, source = "assumed" }
[sources]
memory = "datasheet: a sheet"
flops = "datasheet: a sheet"
launch = "assumed: a guess"
power = "datasheet: a sheet"
efficiency = "assumed: a guess"
"""


def links(cluster: Cluster) -> list[Link]:
    return [data["link"] for _, _, data in cluster.topology.edges(data=True)]


def mistakes(path: Path, text: str | None = None) -> list[str]:
    """The lines of the one ValueError that loading the file raises."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="mistake") as caught:
        load_cluster(str(path))
    return str(caught.value).splitlines()[1:]


@pytest.mark.parametrize("name", device_names())
def test_device(name):
    device = load_device(name)
    computes = device.kind in ("gpu", "npu", "cpu")
    assert device.name == name
    for field in fields(device.memory):
        assert getattr(device.memory, field.name) > 0
    assert device.power_w > 0
    assert all(peak > 0 for peak in device.flops_per_s.values())
    assert (device.launch_s > 0 and "bf16" in device.flops_per_s) or not computes
    assert {"memory", "power", "efficiency"} <= set(device.sources)
    assert not computes or {"flops", "launch"} <= set(device.sources)
    assert all(said.split(": ")[0] in SOURCES for said in device.sources.values())
    for part in device.efficiency.values():
        assert 0 < part.low <= part.value <= part.high <= 1
        assert part.source in SOURCES
        assert part.note


@pytest.mark.parametrize("name", device_names())
def test_peaks_rise_as_numbers_shrink(name):
    peaks = load_device(name).flops_per_s
    ladder = ("fp32", "bf16", "fp8", "fp4"), ("bf16", "int8", "int4"), ("fp32", "fp16", "fp8")
    if name != "v100-sxm-32gb":  # no int8 tensor cores
        for chain in ladder:
            there = [peaks[form] for form in chain if form in peaks]
            assert all(wide <= narrow for wide, narrow in pairwise(there))


@pytest.mark.parametrize("name", hardware_names())
def test_node(name):
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.num_nodes == 1
    assert cluster.host is not None and cluster.host.kind == "cpu"
    assert nx.is_connected(cluster.topology)
    assert all(link.bytes_per_s > 0 and link.latency_s > 0 for link in links(cluster))
    assert {cluster.vertex(rank) for rank in range(cluster.num_ranks)} <= set(cluster.topology)
    assert "links" in cluster.sources
    for link in (cluster.scale_up, cluster.scale_out, cluster.host_link):
        assert link.bytes_per_s > 0


@pytest.mark.parametrize(
    ("name", "up", "host"),
    [
        ("hgx-h100", 450e9, 64e9),
        ("hgx-h800", 200e9, 64e9),
        ("hgx-b200", 900e9, 64e9),
        ("dgx-a100", 300e9, 32e9),
        ("dgx-v100", 6 * 25e9, 16e9),
        ("mi300x-x8", 7 * 64e9, 64e9),
        ("gb200-nvl72", 900e9, 225e9),
        ("cloudmatrix-384", 196e9, 160e9),
        ("pcie-box-4090-x4", 32e9, 32e9),
    ],
)
def test_links_of_a_node_are_the_sheets(name, up, host):
    cluster = load_cluster(name)
    assert cluster.scale_up.bytes_per_s == up
    assert cluster.host_link.bytes_per_s == host


def test_single_gpu_box_is_memory_and_pcie():
    cluster = load_cluster("t4-x1")
    assert cluster.host_link == Link(16e9, 1e-6)
    assert cluster.scale_up.bytes_per_s == cluster.device.memory.bytes_per_s


def test_big_domains_have_all_their_devices():
    assert load_cluster("gb200-nvl72").num_ranks == 72
    assert load_cluster("cloudmatrix-384").num_ranks == 768


def test_fat_tree_of_18_nodes():
    cluster = load_cluster("18 x hgx-h100")
    graph = cluster.topology
    assert nx.is_connected(graph)
    assert cluster.num_ranks == 144
    leaves = [v for v in graph if v.startswith("leaf")]
    spines = [v for v in graph if v.startswith("spine")]
    assert (len(leaves), len(spines)) == (8, 4)
    assert len(graph) == 18 * (8 + 8 + 4 + 1 + 2) + 8 + 4
    for rail in range(8):
        assert {f"n{node}/nic{rail}" for node in range(18)} <= set(graph[f"leaf{rail}"])
    assert cluster.scale_out.bytes_per_s == 50e9
    same_rail, other_rail = cluster.scale_out, cluster.path("n0/nic0", "n1/nic5")
    assert other_rail.latency_s > cluster.path("n0/nic0", "n1/nic0").latency_s
    assert same_rail.latency_s < cluster.path("n0/gpu0", "n1/gpu5").latency_s


def test_a_leaf_goes_up_with_as_much_as_comes_in():
    graph = load_cluster("40 x hgx-h100").topology
    leaves = [v for v in graph if v.startswith("leaf")]
    assert len(leaves) == 16
    for leaf in leaves:
        up = sum(graph.edges[leaf, v]["link"].bytes_per_s for v in graph[leaf] if v.startswith("spine"))
        down = sum(graph.edges[leaf, v]["link"].bytes_per_s for v in graph[leaf] if not v.startswith("spine"))
        assert up == pytest.approx(32 * 50e9)
        assert down <= up


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 80), st.sampled_from([" x ", "x ", "  X  "]), st.sampled_from(["hgx-h100", "dgx-v100"]))
def test_any_number_of_nodes(count, times, name):
    cluster = load_cluster(f" {count}{times}{name} ")
    assert cluster.num_nodes == count
    assert cluster.num_ranks == 8 * count
    assert nx.is_connected(cluster.topology)
    assert cluster.name == (name if count == 1 else f"{count} x {name}")


def test_bare_devices():
    gpu = load_cluster("rtx-4090")
    assert gpu.num_ranks == 1 and gpu.host is not None and gpu.host_link.bytes_per_s == 32e9
    cpu = load_cluster("epyc-9654")
    assert cpu.num_ranks == 1 and cpu.host is None
    with pytest.raises(ValueError, match="no path"):
        _ = cpu.host_link


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("hgx-h10", "nearest: 'hgx-h100'"),
        ("", "no node or device is called ''"),
        ("0 x hgx-h100", "at least 1"),
        ("-3 x hgx-h100", "not '-3'"),
        ("1.5 x hgx-h100", "not '1.5'"),
        ("many x hgx-h100", "not 'many'"),
        ("2 x l4-x1", "no NICs"),
        ("2 x l4", "no NICs"),
        ("no/such/box.toml", "does not exist"),
    ],
)
def test_bad_expressions(expression, says):
    with pytest.raises(ValueError) as caught:
        load_cluster(expression)
    assert says in str(caught.value)


def test_unknown_device_name():
    with pytest.raises(ValueError, match="nearest: 'rtx-4090'"):
        load_device("rtx-409")


def test_own_files(tmp_path):
    (tmp_path / "box.toml").write_text(NODE.replace('"l4"', '"parts/mine.toml"'))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mine.toml").write_text(DEVICE)
    cluster = load_cluster(f"3 x {tmp_path / 'box.toml'}")
    assert cluster.device.name == "mine"
    assert cluster.name == "3 x box"
    assert cluster.num_ranks == 6
    assert cluster.scale_out.bytes_per_s == 12.5e9
    assert load_cluster(str(tmp_path / "box.toml")).num_ranks == 2


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("num_devices = 2", "num_devices = -2", ["num_devices must be a whole number, at least 1, not -2"]),
        ("num_devices = 2", 'num_devices = "2"', ["num_devices must be a whole number", "not '2'"]),
        ("num_devices = 2\n", "", ["num_devices is missing"]),
        ("num_hosts", "num_host", ["num_host is not a key", "nearest: 'num_hosts'", "num_hosts is missing"]),
        ('"l4"', '"l5"', ["device names the unknown device 'l5'", "nearest: 'l4'", "rtx-4090"]),
        ('"l4"', '"nvme-pcie4"', ["device must be of kind gpu or npu or cpu"]),
        ("12.5e9", "0.0", ["network.bytes_per_s must be a positive number", "not 0.0"]),
        ("12.5e9", "nan", ["network.bytes_per_s must be a positive number", "not nan"]),
        ("12.5e9", "true", ["network.bytes_per_s must be a positive number", "not True"]),
        ('to = "host0"', 'to = "host1"', ["links[0].to", "unknown vertex 'host1'"]),
        ('to = "host0"', 'to = "hots0"', ["links[0].to", "unknown vertex 'hots0'", "nearest: 'host'"]),
        ('to = "host0"', 'to = "host"', ["links[0].to", "must be a kind and an index"]),
        ('from = "gpu{i}"', 'from = "gpu*"', ["links[1].to uses i"]),
        ('from = "gpu*"', 'from = "gpu0"', ["leave gpu1, nic1 without a path to gpu0"]),
        ('links = "datasheet: a sheet"', 'links = "a sheet"', ["sources.links must start with one of"]),
        ('links = "datasheet: a sheet"\n', "", ["sources.links is missing"]),
        (NODE[NODE.index("[sources]") :], "", ["sources is missing"]),
        (NODE[NODE.index("[network]") : NODE.index("[sources]")], "", ["network is missing"]),
        ("[vertices]\nnic = 2", "vertices = 3", ["vertices must be a table"]),
    ],
)
def test_mistakes_of_a_node(tmp_path, old, new, says):
    assert old in NODE
    path = tmp_path / "box.toml"
    found = mistakes(path, NODE.replace(old, new, 1))
    assert all(str(path) in line for line in found)
    for words in says:
        assert any(words in line for line in found), found


def test_every_mistake_of_both_files_at_once(tmp_path):
    bad = DEVICE.replace("power_w = 100", "powr_w = 100").replace("bf16 = 100e12", "bf17 = 100e12")
    bad = bad.replace("1e12", "-1e12").replace("value = 0.7, low = 0.5", "value = 1.7, low = 1.6", 1)
    (tmp_path / "mine.toml").write_text(bad)
    node = NODE.replace('"l4"', '"mine.toml"').replace("32e9", '"fast"', 1)
    node = node.replace("num_hosts = 1", "num_hosts = 0")
    found = mistakes(tmp_path / "box.toml", node)
    for words in (
        "mine.toml: powr_w is not a key of this file; nearest: 'power_w'",
        "mine.toml: power_w is missing",
        "mine.toml: flops_per_s.bf17 is not a key of this file; nearest: 'bf16'",
        "mine.toml: memory.bytes_per_s must be a positive number, such as 3.35e12, not -1000000000000.0",
        "mine.toml: efficiency.gemm must keep 0 < low <= value <= high <= 1, not low 1.6, value 1.7, high 0.8",
        "box.toml: links[0].bytes_per_s must be a positive number, such as 64e9, not 'fast'",
        "box.toml: num_hosts must be a whole number, at least 1, not 0",
    ):
        assert sum(words in line for line in found) == 1, (words, found)
    assert len(found) == 7


@pytest.mark.parametrize("cut", [DEVICE.index("bytes_per_s = 1e12") + 13, len(DEVICE) - 3])
def test_truncated_device(tmp_path, cut):
    (tmp_path / "mine.toml").write_text(DEVICE[:cut])
    with pytest.raises(ValueError, match="not whole TOML"):
        load_device(str(tmp_path / "mine.toml"))


def test_files_that_are_none(tmp_path):
    assert "is a directory" in mistakes(tmp_path)[0]
    assert "does not exist" in mistakes(tmp_path / "gone.toml")[0]
    assert "is empty" in mistakes(tmp_path / "empty.toml", "")[0]
    (tmp_path / "noise.toml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in mistakes(tmp_path / "noise.toml")[0]
