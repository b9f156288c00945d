"""Decoding counted by windows of a pool, priced once where nothing changes: equal to token by token, priced anew."""

import dataclasses

import numpy as np
import pytest
from conftest import small_cluster, small_scenario
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim import verbs
from moesim.costs import compute
from moesim.estimate import estimate
from moesim.files.scenarios import load_trace
from moesim.layout import AttentionGrid, ExpertGrid, Layout
from moesim.model import BYTES_PER_PARAM
from moesim.program import iterations
from moesim.program.iterations import Iterations
from moesim.routing.blocks import Blocks, trimmed
from moesim.routing.replay import Replay
from moesim.routing.synthetic import zipf_trace
from moesim.simulate import simulate

few = settings(max_examples=25, deadline=None)


def with_workload(scenario, **changes):
    return dataclasses.replace(scenario, workload=dataclasses.replace(scenario.workload, **changes))


scenarios = st.builds(
    small_scenario,
    nodes=st.integers(1, 2),
    per_node=st.sampled_from([2, 4]),
    seed=st.integers(0, 5),
    experts=st.sampled_from([8, 16]),
    top_k=st.integers(1, 4),
    requests=st.integers(1, 9),
    outputs=st.integers(2, 5),
    shared=st.sampled_from([0, 32]),
    redundant=st.sampled_from([0, 8]),
)


@few
@given(scenarios, st.integers(16, 40), st.booleans(), st.integers(0, 2), st.sampled_from([None, 3, 12]))
def test_a_run_from_the_pool_equals_one_token_by_token(scenario, num_requests, overlap, drafts, pool_tokens):
    scenario = with_workload(
        scenario, num_requests=num_requests, output_tokens=60, num_speculative_tokens=drafts, acceptance_rate=0.5,
        routing_pool_tokens=pool_tokens,
    )  # fmt: skip
    scenario = dataclasses.replace(
        scenario, policies=dataclasses.replace(scenario.policies, two_batch_overlap=overlap)
    )  # fmt: skip
    assert Iterations(scenario)._pool is not None
    pooled, played = estimate(scenario), simulate(scenario)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iterations, "POOL_BYTES", 0)
        assert Iterations(scenario)._pool is None
        counted = estimate(scenario)
    assert pooled.as_json() == counted.as_json()
    assert pooled.load_LR == counted.load_LR and pooled.step_s == counted.step_s
    for name, value in pooled.metrics.items():
        assert played.metrics[name] == pytest.approx(value, rel=1e-9), name


def test_groups_of_experts_and_a_group_for_each_rank_and_stages():
    """Two expert-parallel groups; experts on every rank, where nothing is sent; stages with a part of a batch each."""
    small = small_scenario(per_node=4, requests=8)
    groups = [Layout(AttentionGrid(4), ExpertGrid(edp=2, ep=2)), Layout(AttentionGrid(4), ExpertGrid(edp=4))]
    for layout in (*groups, Layout(AttentionGrid(2), ExpertGrid(ep=2), pp=2)):
        scenario = with_workload(dataclasses.replace(small, layout=layout), num_requests=25, output_tokens=80)
        assert not scenario.mistakes()
        assert Iterations(scenario)._pool is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(iterations, "POOL_BYTES", 0)
            counted = estimate(scenario)
        assert estimate(scenario).as_json() == counted.as_json()


def test_no_pool_where_it_would_not_pay_or_cannot_count():
    """Short runs, answers of unequal length, tokens of a rank that do not stand side by side, messages by node."""
    assert Iterations(small_scenario())._pool is None
    long = with_workload(small_scenario(nodes=2), num_requests=40, output_tokens=200)
    assert Iterations(long)._pool is not None
    trace = long.trace
    uneven = dataclasses.replace(long, trace=trace.take(np.arange(trace.num_tokens) != trace.num_tokens - 1))
    assert Iterations(uneven)._pool is None
    assert Iterations(with_workload(uneven, routing_pool_tokens=16))._pool is not None
    cut = with_workload(small_scenario(nodes=2, tp=2), num_requests=40, output_tokens=200)
    assert Iterations(cut)._pool is None
    rails = dataclasses.replace(long, policies=dataclasses.replace(long.policies, all_to_all="rails"))
    assert Iterations(rails)._pool is None


@few
@given(st.integers(1, 7), st.integers(1, 6), st.integers(1, 30), st.integers(0, 9))
def test_blocks_hold_the_rows_that_are_replayed(num_traced, length, num_requests, seed):
    trace = zipf_trace(1, 4, 1, num_requests=num_traced, prompt_tokens=2, output_tokens=length)
    replay = Replay(trace, np.random.default_rng(seed))
    blocks = Blocks(np.stack(replay.answers, axis=1))
    wanted_SQ = replay.decode_rows(num_requests, 2 * length + 1)
    turns = blocks.turns(num_requests)
    group_Q = np.arange(num_requests) * 3 // num_requests
    windows = blocks.windows(np.arange(num_requests), group_Q)
    edges = blocks.edges(windows)
    for step, wanted_Q in enumerate(wanted_SQ):
        np.testing.assert_array_equal(blocks.rows(turns, num_requests, step), wanted_Q)
        places = blocks.places(windows, step)
        spans = [np.arange(first, first + n) for first, n in zip(places, windows.requests_W, strict=True)]
        np.testing.assert_array_equal(blocks.rows_PM.ravel()[np.concatenate(spans)], wanted_Q)
        np.testing.assert_array_equal(np.repeat(windows.group_W, windows.requests_W), group_Q)
        assert set(places) | set(places + windows.requests_W) <= set(edges)


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), *[st.integers(1, 40)] * 4)
def test_trimmed_answers_fit_and_are_equally_long(lengths, num_requests, num_steps, pool_tokens, multiple):
    answers = [100 * n + np.arange(length) for n, length in enumerate(lengths)]
    found = trimmed(answers, num_requests, num_steps, pool_tokens, multiple)
    assert len({len(rows) for rows in found}) == 1
    assert len(found) * len(found[0]) <= pool_tokens and len(found) <= num_requests
    assert len(found) <= multiple or len(found) % multiple == 0
    for rows, whole in zip(found, answers, strict=False):
        np.testing.assert_array_equal(rows, np.resize(whole, len(rows)))


def test_a_smaller_pool_keeps_the_statistics_and_says_so():
    """Half of a real router's decode tokens: loads, imbalance and times of the whole within a few percent."""
    scenario = with_workload(
        small_scenario(nodes=2, per_node=4, layers=17, experts=64, top_k=8), num_requests=512, output_tokens=65
    )  # fmt: skip
    scenario = dataclasses.replace(scenario, trace=load_trace("olmoe-shape-16x64"))
    whole, part = estimate(scenario), estimate(with_workload(scenario, routing_pool_tokens=2048))
    for name in ("tpot_s", "expert_load_max_to_mean_ratio"):
        assert part.metrics[name] == pytest.approx(whole.metrics[name], rel=0.05), name
    load_LR, part_LR = np.array(whole.load_LR), np.array(part.load_LR)
    assert load_LR.sum() == part_LR.sum()
    assert np.abs(part_LR / load_LR - 1).mean() < 0.05
    said = "decoding replays 32 tokens of the answers of 64 requests of the trace"
    assert said in part.warnings and said not in whole.warnings


@few
@given(scenarios, st.booleans())
def test_prices_of_later_iterations_are_those_of_a_new_forward(scenario, windowed):
    if windowed:
        layers = tuple(
            dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, window=4 if i % 2 else None))
            for i, layer in enumerate(scenario.model.layers)
        )
        scenario = dataclasses.replace(scenario, model=dataclasses.replace(scenario.model, layers=layers))
    used = Iterations(scenario)
    for phase in (used.prefill_batches, used.decode_batches):
        for batch in phase():
            parts = used.parts(batch)
            kept, anew = used.forward.price(parts), Iterations(scenario).forward.price(parts)
            for name in ("seconds_NR", "bytes_NR", "shares_NX"):
                np.testing.assert_array_equal(getattr(kept, name), getattr(anew, name))


@few
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.sampled_from(["bf16", "fp8"]), st.integers(0, 9))
def test_compiled_experts_equal_their_formula(layers, ranks, slots, dtype, seed):
    rng = np.random.default_rng(seed)
    load_LRS = rng.integers(0, 4, (layers, ranks, slots)).astype(np.int32) * rng.integers(0, 300)
    params_LRS = rng.choice([0.0, 1e6, 3e6], load_LRS.shape)
    device = small_cluster().device
    load = load_LRS * (params_LRS > 0)
    num_bytes = params_LRS * (BYTES_PER_PARAM[dtype] * (load > 0)) + 4.0 * 128 * load
    plain = compute.gemm_s(2.0 * params_LRS * load, num_bytes, device, dtype, "grouped_gemm").sum(axis=-1)
    found = compute.experts_s(load_LRS, params_LRS, 128, device, dtype)
    np.testing.assert_allclose(found, plain, rtol=1e-12)
    np.testing.assert_allclose(
        compute.experts_s(load_LRS, 1e6, 128, device, dtype),
        compute.experts_s(load_LRS, np.full(load_LRS.shape, 1e6), 128, device, dtype),
    )


def test_the_tally_is_that_of_plain_sums():
    scenario = small_scenario(nodes=2, redundant=8)
    loads = [i.counts.load_LRS.sum(axis=2) for i in Iterations(scenario) if i.phase == "decode"]
    result = estimate(scenario)
    np.testing.assert_array_equal(result.load_LR, sum(loads))
    ratios = [(load_LR.max(axis=1) / load_LR.mean(axis=1)).mean() for load_LR in loads]
    assert result.metrics["expert_load_max_to_mean_ratio"] == pytest.approx(np.mean(ratios), rel=1e-12)


def test_the_key_is_read_and_checked(tmp_path):
    text = 'model = "olmoe-1b-7b"\nhardware = "hgx-h100"\ntrace = "zipf"\n[layout]\nattention = { dp = 8 }\n'
    text += "experts = { ep = 8 }\n[workload]\nnum_requests = 64\noutput_tokens = 9\n"
    (tmp_path / "a.toml").write_text(text + "routing_pool_tokens = 128\n")
    (scenario,) = verbs.load(tmp_path / "a.toml")
    assert any("decoding replays 4 tokens of the answers of 32 requests" in w for w in estimate(scenario).warnings)
    (tmp_path / "b.toml").write_text(text + "routing_pool_tokens = 0\n")
    with pytest.raises(ValueError, match="routing_pool_tokens must be at least 1, given 0"):
        verbs.load(tmp_path / "b.toml")
