"""Laws that every run keeps, over random models, layouts and traces."""

import itertools
import json

import numpy as np
import pytest
from conftest import small_scenario
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesim import verbs
from moesim.estimate import estimate
from moesim.policies.cache import CACHES
from moesim.policies.executor import EXECUTORS
from moesim.policies.predictor import PREDICTORS
from moesim.policies.prefetch import PREFETCHERS
from moesim.program.iterations import Iterations
from moesim.simulate import simulate

scenarios = st.builds(
    small_scenario,
    nodes=st.integers(1, 2),
    per_node=st.sampled_from([2, 4]),
    tp=st.sampled_from([1, 2]),
    seed=st.integers(0, 5),
    layers=st.integers(2, 4),
    dense_first=st.booleans(),
    experts=st.sampled_from([8, 16]),
    top_k=st.integers(1, 4),
    requests=st.integers(1, 9),
    outputs=st.integers(2, 4),
    shared=st.sampled_from([0, 32]),
    redundant=st.sampled_from([0, 8]),
)
tensor_parallel = st.builds(
    small_scenario,
    spread=st.just(False),
    tp=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 5),
    layers=st.integers(2, 4),
)
offloaded = st.builds(
    small_scenario,
    per_node=st.just(1),
    spread=st.just(False),
    seed=st.integers(0, 5),
    fraction=st.sampled_from([0.0, 0.25, 0.5]),
    policies=st.fixed_dictionaries(
        {
            "cache": st.sampled_from(sorted(CACHES)),
            "predictor": st.sampled_from(sorted(PREDICTORS)),
            "prefetch": st.sampled_from(sorted(PREFETCHERS)),
            "executor": st.sampled_from(sorted(EXECUTORS)),
        }
    ),
    layers=st.integers(2, 4),
    requests=st.integers(1, 4),
)
anything = st.one_of(scenarios, tensor_parallel, offloaded)
few = settings(max_examples=25, deadline=None)


@few
@given(anything, st.integers(0, 3))
def test_both_engines_agree_where_nothing_waits(scenario, timeline):
    a, b = estimate(scenario), simulate(scenario, timeline=timeline)
    assert a.metrics.keys() == b.metrics.keys()
    for name in a.metrics:
        assert a.metrics[name] == pytest.approx(b.metrics[name], rel=1e-9), name
    assert a.load_LR == b.load_LR


@few
@given(scenarios)
def test_tokens_and_bytes_are_conserved(scenario):
    routed = scenario.model.experts
    for iteration in Iterations(scenario):
        counts = iteration.counts
        num_tokens = counts.load_LRS[0].sum() // routed.top_k
        assert (counts.load_LRS.sum(axis=(1, 2)) == num_tokens * routed.top_k).all()
        sent_near, sent_far, got_near, got_far = counts.traffic_CLR.sum(axis=2)
        assert (sent_near == got_near).all()
        assert (sent_far == got_far).all()
        assert (sent_near + sent_far <= num_tokens * min(routed.top_k, scenario.cluster.num_ranks)).all()
        rows = {
            name: [n for n, op in enumerate(iteration.program.operations) if op.name == name]
            for name in ("dispatch", "combine")
        }
        per_token = {"dispatch": 2 * 128, "combine": 2 * 128}
        for name, ids in rows.items():
            moved = iteration.costs.bytes_NR[ids].sum(axis=1)
            np.testing.assert_allclose(moved, (sent_near + sent_far) * per_token[name])


ACTIVE = {"cache": "activation_aware", "predictor": "map_search", "prefetch": "by_activity", "executor": "bit_planes"}
# a copy ahead gives way to one that is needed
INTERRUPTED = small_scenario(per_node=1, spread=False, fraction=0.25, layers=2, requests=1, policies=ACTIVE)


@few
@given(anything)
@example(INTERRUPTED)
def test_nothing_starts_before_what_it_waits_for_and_no_stream_does_two_things_at_once(scenario):
    result = simulate(scenario, timeline=2)
    assert result.records
    for record in result.records:
        assert record.finish_s >= record.start_s >= 0
        for a in record.after:
            assert result.records[a].finish_s <= record.start_s + 1e-15
    streams = {}
    for record in result.records:
        streams.setdefault((record.rank, record.resource), []).append(record)
    for records in streams.values():
        records.sort(key=lambda r: (r.start_s, r.finish_s))
        for one, next_one in itertools.pairwise(records):
            assert one.finish_s <= next_one.start_s + 1e-12


@few
@given(anything)
def test_same_seed_same_bytes(scenario):
    once, again = (json.dumps(verbs.run(scenario, "simulate").as_json()) for _ in range(2))
    assert once == again


@few
@given(st.integers(0, 5), st.sampled_from([2.0, 4.0, 8.0]))
def test_times_scale_with_the_machine(seed, factor):
    """All rates x c and all latencies / c give all times / c (powers of two, so to the last bits)."""
    slow = estimate(small_scenario(nodes=2, seed=seed))
    fast = estimate(small_scenario(nodes=2, seed=seed, rate=factor, latency=1 / factor))
    for name, value in slow.metrics.items():
        if name.endswith("_per_s") or name.endswith("_per_device"):
            assert fast.metrics[name] == pytest.approx(value * factor, rel=1e-9)
        elif name.endswith("_s"):
            assert fast.metrics[name] == pytest.approx(value / factor, rel=1e-9)
        else:
            assert fast.metrics[name] == pytest.approx(value, rel=1e-9)


def test_intervals_hold_the_value_and_shares_add_up():
    result = verbs.run(small_scenario())
    assert {"tpot_s", "ttft_s", "output_tokens_per_s"} <= result.intervals.keys()
    for name, (low, high) in result.intervals.items():
        assert low <= result.metrics[name] <= high
    assert sum(result.provenance.values()) == pytest.approx(1)
    for phase, steps in {"prefill": "ttft_s", "decode": "tpot_s"}.items():
        total = sum(result.breakdown_s[phase].values()) * (
            result.metrics["num_prefill_iterations"] if phase == "prefill" else 1
        )
        assert total == pytest.approx(result.metrics[steps])
