"""Flows on links: fair shares, bytes and bounds, routes of real machines, failures, and one clear error each."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from conftest import small_cluster
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moesim.files.hardware import load_cluster
from moesim.hardware import Cluster, Link
from moesim.network.fair import fair_rates, link_bound_s, play
from moesim.network.routes import Fabric, Routes


@st.composite
def networks(draw):
    """Random flows over random links: no topology, so that nothing is symmetric."""
    num_links = draw(st.integers(1, 6))
    paths = draw(st.lists(st.sets(st.integers(0, num_links - 1), min_size=1, max_size=4), min_size=1, max_size=8))
    start_F = np.concatenate([[0], np.cumsum([len(path) for path in paths])])
    routes = Routes(start_F, np.array([link for path in paths for link in path]), num_links)
    rates = draw(st.lists(st.floats(1.0, 100.0), min_size=num_links, max_size=num_links))
    sizes = draw(st.lists(st.floats(0.5, 50.0), min_size=len(paths), max_size=len(paths)))
    return routes, np.array(rates), np.array(sizes)


def links_of(routes, flow):
    return routes.link_X[routes.start_F[flow] : routes.start_F[flow + 1]]


@given(networks())
@settings(deadline=None)
def test_every_flow_has_a_full_link_on_which_none_has_more(network):
    """This is what max-min fairness means (Bertsekas, Gallager, section 6.5.2), and only one allocation has it."""
    routes, rates_K, _ = network
    rate_F = fair_rates(routes, rates_K)
    load_K = routes.load(rate_F)
    assert (load_K <= rates_K * (1 + 1e-9)).all() and (rate_F > 0).all()
    most_K = np.array([max(rate_F[[f for f in range(routes.num_flows) if k in links_of(routes, f)]], default=0)
                       for k in range(routes.num_links)])  # fmt: skip
    for flow in range(routes.num_flows):
        assert any(load_K[k] >= rates_K[k] * (1 - 1e-9) and rate_F[flow] >= most_K[k] * (1 - 1e-9)
                   for k in links_of(routes, flow))  # fmt: skip


@given(networks())
@settings(deadline=None, max_examples=60)
def test_rates_are_those_of_linear_programmes(network):
    """The least rate as large as can be, then the least of the others, and so on: by a solver that knows no links.

    Source: the definition by linear programmes in Nace, Pioro, IEEE Communications Surveys 2008, section III.
    """
    routes, rates_K, _ = network
    F = routes.num_flows
    uses_KF = np.zeros((routes.num_links, F))
    for flow in range(F):
        uses_KF[links_of(routes, flow), flow] = 1.0
    fixed: dict[int, float] = {}
    while len(fixed) < F:
        open_ = [f for f in range(F) if f not in fixed]
        # Variables: all rates, and the least of those that are open, which is made as large as can be.
        least = np.zeros((len(open_), F + 1))
        least[np.arange(len(open_)), open_], least[:, F] = -1.0, 1.0
        rows = np.vstack([np.hstack([uses_KF, np.zeros((len(uses_KF), 1))]), least])
        limits = np.concatenate([rates_K, np.zeros(len(open_))])
        bounds = [(fixed.get(f, 0.0), fixed.get(f)) for f in range(F)] + [(0.0, None)]
        top = -linprog([0.0] * F + [-1.0], rows, limits, bounds=bounds).fun
        for flow in open_:  # those that cannot have more without another open one having less than that
            mine = [(fixed.get(f, top if f in open_ else 0.0) * (1 - 1e-9), fixed.get(f)) for f in range(F)]
            most = -linprog(-np.eye(F)[flow], uses_KF, rates_K * (1 + 1e-9), bounds=mine).fun
            if most <= top * (1 + 1e-6):
                fixed[flow] = top
    assert fair_rates(routes, rates_K) == pytest.approx([fixed[f] for f in range(F)], rel=1e-5)


@given(networks(), st.floats(0.1, 10.0))
@settings(deadline=None)
def test_rates_scale_with_the_links_and_an_idle_flow_takes_nothing(network, factor):
    routes, rates_K, _ = network
    assert fair_rates(routes, factor * rates_K) == pytest.approx(factor * fair_rates(routes, rates_K))
    active_F = np.arange(routes.num_flows) % 2 == 0
    some = fair_rates(routes, rates_K, active_F)
    assert (some[~active_F] == 0).all()
    only = [links_of(routes, f) for f in np.flatnonzero(active_F)]
    alone = Routes(np.concatenate([[0], np.cumsum([len(x) for x in only])]), np.concatenate(only), routes.num_links)
    assert some[active_F] == pytest.approx(fair_rates(alone, rates_K))


def played_plainly(routes, bytes_F, rates_K):
    """The same by the words of the definition: step to the next end, share anew."""
    left, now, done = dict(enumerate(bytes_F)), 0.0, {}
    while left:
        active = np.isin(np.arange(routes.num_flows), list(left))
        rate_F = fair_rates(routes, rates_K, active)
        step = min(size / rate_F[f] for f, size in left.items())
        now += step
        left = {f: size - rate_F[f] * step for f, size in left.items()}
        for f in [f for f, size in left.items() if size < 1e-9]:
            done[f] = now
            del left[f]
    return np.array([done[f] for f in range(routes.num_flows)])


@given(networks())
@settings(deadline=None)
def test_played_flows(network):
    routes, rates_K, sizes_F = network
    latency_K = np.linspace(0.1, 0.3, routes.num_links)
    done_F = play(routes, sizes_F, rates_K, 0 * latency_K)
    assert done_F == pytest.approx(played_plainly(routes, sizes_F, rates_K), rel=1e-6)
    bound = link_bound_s(routes, sizes_F, rates_K)
    assert done_F.max() >= bound * (1 - 1e-9)  # no link carries more than it can
    later_F = play(routes, sizes_F, rates_K, latency_K)
    assert later_F - done_F == pytest.approx([latency_K[links_of(routes, f)].sum() for f in range(routes.num_flows)])
    rough_F = play(routes, sizes_F, rates_K, 0 * latency_K, tolerance=0.05)
    assert (rough_F >= 0).all() and rough_F.max() >= bound * (1 - 1e-9)
    doubled = play(routes, 2 * sizes_F, rates_K, 0 * latency_K)
    assert doubled == pytest.approx(2 * done_F)


def test_a_flow_without_bytes_takes_no_time():
    routes = Routes(np.array([0, 1, 2]), np.array([0, 0]), 1)
    assert play(routes, np.array([0.0, 10.0]), np.array([5.0]), np.array([1.0])).tolist() == [0.0, 3.0]


def test_two_flows_on_one_link_and_one_beside():
    """The classic: flow 0 crosses both links, 1 and 2 one each."""
    routes = Routes(np.array([0, 2, 3, 4]), np.array([0, 1, 0, 1]), 2)
    assert fair_rates(routes, np.array([1.0, 2.0])).tolist() == [0.5, 0.5, 1.5]


def all_pairs(num_ranks):
    source, target = (x.ravel() for x in np.meshgrid(np.arange(num_ranks), np.arange(num_ranks), indexing="ij"))
    return source[source != target], target[source != target]


@pytest.mark.parametrize("name", ["gb200-nvl72", "hgx-h100", "4 x hgx-h100", "dgx-a100"])
def test_all_to_all_on_a_machine_is_as_fast_as_its_narrowest_ports(name):
    cluster = load_cluster(name)
    fabric = Fabric(cluster)
    routes = fabric.routes(*all_pairs(cluster.num_ranks))
    rate_F = fair_rates(routes, fabric.bytes_per_s_K)
    each = np.full(routes.num_flows, 1e6)
    assert play(routes, each, fabric.bytes_per_s_K, 0 * fabric.latency_s_K).max() == pytest.approx(
        link_bound_s(routes, each, fabric.bytes_per_s_K)
    )
    if cluster.num_nodes == 1:
        assert rate_F == pytest.approx(cluster.scale_up.bytes_per_s / (cluster.num_ranks - 1), rel=0.01)
    else:  # every NIC carries its share alike: rails are used, and no NIC sends through another GPU
        load_K = routes.load(np.ones(routes.num_flows))
        nic_K = [load_K[i] for (a, b), i in fabric.index.items() if "nic" in a and "leaf" in b]
        assert min(nic_K) == max(nic_K) > 0


def test_routes_take_rails_and_cross_over_inside_the_sender():
    fabric = Fabric(load_cluster("2 x hgx-h100"))
    ends = list(fabric.index)
    there = [ends[i] for i in fabric.path("n0/gpu0", "n1/gpu3")]
    assert there == [
        ("n0/gpu0", "n0/nvswitch0"), ("n0/nvswitch0", "n0/gpu3"), ("n0/gpu3", "n0/nic3"), ("n0/nic3", "leaf3"),
        ("leaf3", "n1/nic3"), ("n1/nic3", "n1/gpu3"),
    ]  # fmt: skip


def test_equal_paths_are_spread_by_a_hash_that_no_run_changes():
    fabric = Fabric(load_cluster("64 x hgx-h100"))  # two leaves a rail: spines between them
    starts = [f"n{n}/gpu0" for n in range(32)]
    used = [next(name for i in fabric.path(start, "n40/gpu0") for name in [list(fabric.index)[i][1]] if "spine" in name)
            for start in starts]  # fmt: skip
    assert len(set(used)) > 3
    again = Fabric(load_cluster("64 x hgx-h100"))
    assert [again.path(start, "n40/gpu0") for start in starts] == [fabric.path(start, "n40/gpu0") for start in starts]
    other = Fabric(fabric.cluster, seed=1)
    assert [other.path(start, "n40/gpu0") for start in starts] != [fabric.path(start, "n40/gpu0") for start in starts]


def test_failures_slow_what_crosses_them():
    cluster = load_cluster("2 x hgx-h100")
    ranks = np.arange(8), np.arange(8, 16)
    whole = Fabric(cluster)
    routes = whole.routes(*ranks)
    rates = fair_rates(routes, whole.bytes_per_s_K)
    assert rates == pytest.approx(50e9)
    half = Fabric(cluster, {("n0/nic2", "leaf2"): 0.5})
    slow = fair_rates(half.routes(*ranks), half.bytes_per_s_K)
    assert slow == pytest.approx(np.where(np.arange(8) == 2, 25e9, 50e9))
    down = Fabric(cluster, {"n0/nic2": 0.0})  # rank 2 goes through another GPU's NIC, and both share it
    around = fair_rates(down.routes(*ranks), down.bytes_per_s_K)
    assert sorted(around)[:2] == pytest.approx([25e9, 25e9]) and sorted(around)[2] == pytest.approx(50e9)


def test_bad_fabrics_and_routes_are_told_in_one_sentence():
    cluster = small_cluster(nodes=2)
    with pytest.raises(ValueError, match=r"no n0/gpu0 - n1/gpu0 in its topology; slow a link"):
        Fabric(cluster, {("n0/gpu0", "n1/gpu0"): 0.5})
    with pytest.raises(ValueError, match="no n9/nic0 in its topology"):
        Fabric(cluster, {"n9/nic0": 0.5})
    with pytest.raises(ValueError, match=r"must keep 0 to 1 of its bandwidth, given 1\.5"):
        Fabric(cluster, {"leaf0": 1.5})
    with pytest.raises(ValueError, match="no rank 10; it has 0 to 7"):
        Fabric(cluster).routes([0], [10])
    with pytest.raises(ValueError, match=r"no switch joins the devices of node 0; take another way"):
        Fabric(load_cluster("rtx-4090")).routes([0], [1])
    with pytest.raises(ValueError, match="no path from n0/gpu0 to n1/gpu0"):
        Fabric(cluster, {f"leaf{i}": 0.0 for i in range(4)}).routes([0], [4])
    graph = nx.Graph()
    graph.add_edge("n0/gpu0", "n0/host0", link=Link(0.0, 1e-6))
    dead = Cluster("dead", cluster.device, 1, 1, graph)
    with pytest.raises(ValueError, match="the link n0/gpu0 - n0/host0 has no bandwidth"):
        Fabric(dead)
