"""Autoscalers: the contract of all of them, Kubernetes' formula, and what keeps it from swinging."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.policies.autoscaler import AUTOSCALERS, Autoscaling, FleetLoad


def load(now_s=0.0, wanted=4, running_fraction=0.7, waiting=0, kv=0.0, up=None) -> FleetLoad:
    return FleetLoad(now_s, wanted, wanted if up is None else up, waiting, 0, running_fraction, kv)


def scaler(policy="target_utilisation", **fields):
    return AUTOSCALERS[policy]().start(Autoscaling(policy, **{"min_instances": 1, "max_instances": 20, **fields}))


@given(
    st.sampled_from(sorted(AUTOSCALERS)),
    st.lists(st.tuples(st.floats(0, 3), st.integers(0, 500), st.integers(1, 9)), min_size=1, max_size=20),
)
def test_never_outside_its_bounds(policy, steps):
    decide, wanted = scaler(policy, min_instances=2, max_instances=6), 3
    for number, (fraction, waiting, up) in enumerate(steps):
        wanted = decide(load(number * 15.0, wanted, fraction, waiting, up=min(up, wanted)))
        assert 2 <= wanted <= 6


@pytest.mark.parametrize(
    ("fraction", "desired"), [(0.7, 4), (0.77, 4), (0.769, 4), (0.78, 5), (1.4, 8), (0.63, 4), (0.6, 4), (0.35, 2)]
)
def test_kubernetes_formula(fraction, desired):
    assert scaler(stabilisation_s=0.0)(load(running_fraction=fraction)) == desired


def test_the_kv_cache_can_be_the_metric():
    assert scaler(metric="kv", target=0.5)(load(running_fraction=0.1, kv=1.0)) == 8


def test_what_is_on_its_way_is_not_asked_for_again():
    decide = scaler()
    assert decide(load(0.0, 4, 1.4)) == 8
    assert decide(load(15.0, 8, 1.4, up=4)) == 8


def test_up_at_once_but_down_only_when_nothing_else_was_wanted_lately():
    decide = scaler(stabilisation_s=60.0)
    assert decide(load(0.0, 4, 1.4)) == 8
    assert decide(load(15.0, 8, 0.1)) == 8  # 2 would do, but 8 was wanted 15 s ago
    assert decide(load(60.0, 8, 0.1)) == 8
    assert decide(load(61.0, 8, 0.1)) == 2


def test_queue_length():
    decide = scaler("queue_length", target=10.0, stabilisation_s=0.0)
    assert decide(load(wanted=2, running_fraction=1.0, waiting=35)) == 6
    assert decide(load(15.0, wanted=6, running_fraction=0.5, waiting=0)) == 3
    assert decide(load(30.0, wanted=3, running_fraction=0.0, waiting=0)) == 1


def test_fixed_keeps_what_there_is():
    assert scaler("fixed")(load(wanted=5, running_fraction=3.0, waiting=999)) == 5


def test_start_takes_the_time_to_load_weights_unless_given():
    assert Autoscaling(load_bytes_per_s=2e9).starting_s(30e9) == 15.0
    assert Autoscaling(startup_s=0.0).starting_s(30e9) == 0.0


def test_mistakes_are_all_named():
    assert Autoscaling().mistakes() == []
    wrong = Autoscaling("none", 3, 2, 0.0, "cpu", -1.0, -1.0, -1.0, 0.0)
    text = "\n".join(wrong.mistakes())
    for name in ("policy", "metric", "min_instances", "interval_s", "target", "stabilisation_s", "startup_s", "load_"):
        assert name in text
