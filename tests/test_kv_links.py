"""KV transfers that share ports: hand-made examples, conservation, and layer-wise sending against a plain twin."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.network.kv_links import KvLinks, left_after_prefill_bytes


def links(egress, ingress=None) -> KvLinks:
    return KvLinks(np.array(egress, float), np.array(ingress or egress, float))


def test_one_transfer_takes_its_slower_port():
    net = links([10.0, 1.0], [10.0, 4.0])
    number = net.start(2.0, 0, 1, 8.0)
    assert net.next_finish_s() == 4.0
    assert net.finished(3.9) == []
    assert net.finished(4.0) == [number]
    assert net.finished(9.0) == []
    assert net.next_finish_s() == math.inf


def test_two_share_an_egress_and_the_longer_one_speeds_up_when_the_other_ends():
    net = links([2.0, 9.0, 9.0])
    short, long = net.start(0.0, 0, 1, 3.0), net.start(0.0, 0, 2, 5.0)
    assert net.next_finish_s() == 3.0  # each has 1 byte/s
    assert net.finished(3.0) == [short]
    assert net.next_finish_s() == 4.0  # 2 bytes left at 2 bytes/s
    assert net.finished(4.0) == [long]


def test_a_late_start_slows_what_is_under_way():
    net = links([9.0, 9.0, 9.0], [9.0, 9.0, 1.0])
    first = net.start(0.0, 0, 2, 2.0)
    second = net.start(1.0, 1, 2, 2.0)  # first has 1 byte left; both now have 0.5 bytes/s
    assert net.finished(100.0) == [first, second]
    again = links([9.0, 9.0, 9.0], [9.0, 9.0, 1.0])
    again.start(0.0, 0, 2, 2.0)
    again.start(1.0, 1, 2, 2.0)
    assert again.next_finish_s() == 3.0
    again.finished(3.0)
    assert again.next_finish_s() == 4.0


def test_max_min_gives_what_a_narrow_port_leaves():
    # 0 -> 2 is held to 1 by the ingress of 2, so 0 -> 1 has the other 3 of the egress of 0.
    net = links([4.0, 9.0, 9.0], [9.0, 9.0, 1.0])
    net.start(0.0, 0, 1, 3.0)
    net.start(0.0, 0, 2, 1.0)
    assert net.next_finish_s() == pytest.approx(1.0)
    assert sorted(net.finished(1.0 + 1e-9)) == [0, 1]


def test_nothing_to_send_ends_at_once_and_a_cancelled_one_never():
    net = links([1.0, 1.0])
    assert net.start(5.0, 0, 1, 0.0) == 0
    assert net.next_finish_s() == 5.0 and net.finished(5.0) == [0]
    number = net.start(5.0, 0, 1, 4.0)
    assert net.cancel(6.0, number) == 3.0
    assert net.finished(50.0) == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.floats(0.5, 20), st.floats(0, 5)), max_size=8))
def test_no_port_carries_more_than_it_can_and_none_idles_when_alone(jobs):
    net, rate = links([2.0, 3.0, 5.0, 7.0]), np.array([2.0, 3.0, 5.0, 7.0])
    now, egress, ingress, started = 0.0, np.zeros(4), np.zeros(4), {}
    for source, hop, size, wait in jobs:
        now += wait
        target = (source + hop) % 4
        started[net.start(now, source, target, size)] = (now, size / min(rate[source], rate[target]))
        egress[source] += size
        ingress[target] += size
    ends, got = {}, net.finished(now)
    ends |= dict.fromkeys(got, now)
    while net.next_finish_s() < math.inf:
        now = net.next_finish_s()
        ends |= dict.fromkeys(net.finished(now), now)
    assert sorted(ends) == sorted(started)  # each ends once
    for number, (begin, alone) in started.items():
        assert ends[number] >= begin + alone * (1 - 1e-9) or number in got
    if started:
        assert now - min(b for b, _ in started.values()) >= max((egress / rate).max(), (ingress / rate).max()) * (
            1 - 1e-9
        )
        total_alone = max(b for b, _ in started.values()) + sum(alone for _, alone in started.values())
        assert now <= total_alone * (1 + 1e-9)


@pytest.mark.parametrize(("source", "target", "size"), [(0, 0, 1.0), (0, 2, 1.0), (-1, 0, 1.0), (0, 1, -1.0)])
def test_wrong_transfers_are_refused(source, target, size):
    with pytest.raises(ValueError, match="KV transfer"):
        links([1.0, 1.0]).start(0.0, source, target, size)


def test_time_runs_forward_and_ports_have_bandwidth():
    net = links([1.0, 1.0])
    net.finished(3.0)
    with pytest.raises(ValueError, match="already"):
        net.finished(2.0)
    with pytest.raises(ValueError, match="above 0"):
        links([1.0, 0.0])


@given(st.floats(1, 1e6), st.integers(1, 60), st.floats(0.01, 10), st.floats(1, 1e6))
def test_layer_wise_sending_is_what_a_loop_over_layers_gives(size, layers, prefill_s, rate):
    free_s = 0.0
    for layer in range(layers):
        free_s = max(free_s, (layer + 1) * prefill_s / layers) + size / layers / rate
    left_s = left_after_prefill_bytes(size, layers, prefill_s, rate) / rate
    assert prefill_s + left_s == pytest.approx(free_s, rel=1e-9)
