"""The trace generator: what it copies, what it keeps, and whether held-out requests look like its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cli import cli
from moesim.files.generators import read_generator, write_generator
from moesim.files.trace_rules import trace_mistakes
from moesim.files.traces import read_trace, write_trace
from moesim.routing import generator as module
from moesim.routing.generator import Shape, fit_generator
from moesim.routing.judge import judge_generator, zipf_exponent
from moesim.routing.scores import with_scores
from moesim.routing.synthetic import zipf_trace
from moesim.routing.trace import RoutingTrace, joined

DATA = Path(__file__).parents[2] / "shared" / "data"


def small_trace(seed=0, requests=6, prompt=9, output=7, layers=4, experts=16, top_k=3, **kept) -> RoutingTrace:
    """A made-up trace with gate weights, heaviest first."""
    trace = zipf_trace(
        layers, experts, top_k, num_requests=requests, prompt_tokens=prompt, output_tokens=output, seed=seed
    )
    weights = np.random.default_rng(seed).random(trace.expert_ids_TLK.shape)
    return replace(trace, weights_TLK=-np.sort(-weights, axis=2).astype(np.float16), **kept)


def sampled(generator, number, **settings) -> RoutingTrace:
    return joined(list(generator.sample(number, **settings)))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 99),
    requests=st.integers(1, 6),
    prompt=st.integers(0, 9),
    output=st.integers(1, 9),
    number=st.integers(1, 9),
    run=st.sampled_from([1.0, 3.0, 64.0]),
    crossover=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_each_token_and_layer_is_a_fitted_one_of_its_phase(seed, requests, prompt, output, number, run, crossover):
    fitted = small_trace(seed, requests, prompt, output)
    generator = fit_generator(fitted, num_classes=4, run_tokens=run, crossover_rate=crossover)
    trace = sampled(generator, number, prompt_tokens=(0, 5), output_tokens=(1, 30), seed=seed)
    assert trace_mistakes(trace) == []
    assert np.unique(trace.request_T).tolist() == list(range(number))
    for request in range(number):
        own = trace.request_T == request
        assert 0 <= (~trace.is_decode_T[own]).sum() <= 5 and 1 <= trace.is_decode_T[own].sum() <= 30
    for is_decode in (False, True):
        for layer in range(trace.num_layers):
            rows = trace.is_decode_T == is_decode
            phase = fitted.is_decode_T == is_decode
            known = fitted.take(phase if phase.any() else slice(None))
            seen = {tuple(ids) for ids in known.expert_ids_TLK[:, layer].tolist()}
            assert {tuple(ids) for ids in trace.expert_ids_TLK[rows, layer].tolist()} <= seen


def test_endless_runs_without_crossovers_are_the_fitted_requests():
    fitted = small_trace(requests=5)
    trace = sampled(fit_generator(fitted, run_tokens=1e12, crossover_rate=0.0), 5)
    for name in ("expert_ids_TLK", "weights_TLK", "request_T", "position_T", "is_decode_T"):
        np.testing.assert_array_equal(getattr(trace, name), getattr(fitted, name), err_msg=name)
    np.testing.assert_array_equal(trace.predicted_HTLW[0], fitted.predicted_HTLW[0])


def test_jumps_go_to_tokens_of_the_class_that_would_have_come():
    """Requests that count the classes up in turn: with jumps at every token the generated ones still do."""
    steps = 24
    ids = np.arange(steps) % 8
    fitted = small_trace(requests=100, prompt=0, output=steps, layers=2, experts=16, top_k=2)
    ids_TLK = np.stack([ids, ids + 8], axis=1)[:, None].repeat(2, axis=1).astype(np.uint8)
    fitted = replace(fitted, expert_ids_TLK=np.tile(ids_TLK, (100, 1, 1)))
    generator = fit_generator(fitted, num_classes=64, run_tokens=1.0)
    trace = sampled(generator, 4, seed=3)
    follows = np.diff(trace.request_T) == 0
    now, then = trace.expert_ids_TLK[1:, 0, 0][follows], trace.expert_ids_TLK[:-1, 0, 0][follows]
    assert ((now - then.astype(int)) % 8 == 1).all()


def test_parts_do_not_change_what_is_drawn(monkeypatch):
    generator = fit_generator(small_trace(), num_classes=4, run_tokens=4)
    whole = sampled(generator, 7, seed=5)
    monkeypatch.setattr(module, "_PART_TOKEN_LAYERS", 50)
    parts = list(generator.sample(7, seed=5))
    assert len(parts) > 3
    np.testing.assert_array_equal(joined(parts).expert_ids_TLK, whole.expert_ids_TLK)
    assert (sampled(generator, 7, seed=6).expert_ids_TLK != whole.expert_ids_TLK).any()


@settings(max_examples=20, deadline=None)
@given(layers=st.integers(1, 11), experts=st.sampled_from([8, 16, 40, 300]), top_k=st.integers(1, 8))
def test_another_shape(layers, experts, top_k):
    fitted = small_trace()
    generator = fit_generator(fitted, num_classes=4, run_tokens=4)
    trace = sampled(generator, 5, shape=Shape(layers, experts, top_k), seed=1)
    assert Shape.of(trace) == Shape(layers, experts, top_k)
    assert trace_mistakes(trace) == []
    weights = trace.weights_TLK.astype(np.float64)
    assert (np.diff(weights, axis=2) <= 0).all(), "best first"
    # The gate's mass is a fitted token's, however many experts share it.
    masses = {round(m, 2) for m in fitted.weights_TLK.astype(np.float64).sum(axis=2).ravel()}
    got = {round(m, 2) for m in weights.sum(axis=2).ravel()}
    assert all(min(abs(m - mass) for mass in masses) < 0.02 for m in got)


def test_finer_experts_are_parts_of_the_fitted_ones_and_tokens_of_a_class_agree():
    fitted = small_trace()
    generator = fit_generator(fitted, num_classes=1, run_tokens=1e12, crossover_rate=0.0)
    generator = replace(generator, class_T=np.zeros_like(generator.class_T))
    trace = sampled(generator, 6, shape=Shape(4, 64, 3))
    np.testing.assert_array_equal(trace.expert_ids_TLK // 4, fitted.expert_ids_TLK)
    for layer in range(4):
        parents = trace.expert_ids_TLK[:, layer].ravel() // 4
        for parent in np.unique(parents):
            assert len(np.unique(trace.expert_ids_TLK[:, layer].ravel()[parents == parent])) == 1


def test_scores_put_the_chosen_experts_first():
    trace = small_trace(requests=20)
    scored = with_scores(trace, np.ones((4, 16)), np.random.default_rng(0))
    assert trace_mistakes(scored) == []
    chosen = np.take_along_axis(scored.scores_TLE, trace.expert_ids_TLK.astype(int), axis=2)
    rest = scored.scores_TLE.copy()
    np.put_along_axis(rest, trace.expert_ids_TLK.astype(int), -np.inf, axis=2)
    assert (chosen.min(axis=2) >= rest.max(axis=2)).all() and (np.diff(chosen, axis=2) <= 0).all()
    np.testing.assert_allclose(np.exp(chosen.astype(float)), trace.weights_TLK.astype(float), rtol=2e-2)
    without = with_scores(replace(trace, weights_TLK=None), np.ones((4, 16)), np.random.default_rng(0))
    best = np.argsort(-without.scores_TLE, axis=2, kind="stable")[:, :, :3]
    np.testing.assert_array_equal(best, trace.expert_ids_TLK)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_zipf_exponent_is_found(exponent):
    trace = zipf_trace(2, 64, 1, num_requests=2000, prompt_tokens=50, output_tokens=0, exponent=exponent)
    assert zipf_exponent(trace) == pytest.approx(exponent, abs=0.05)


def test_what_makes_no_sense_is_said():
    trace = small_trace()
    with pytest.raises(ValueError, match="must be at least 1, the crossover rate"):
        fit_generator(trace, crossover_rate=2.0)
    generator = fit_generator(trace)
    for wrong, said in (
        ({"num_requests": 0}, "at least 1 request"),
        ({"num_requests": 1, "prompt_tokens": (5, 3)}, "prompt tokens must be a range"),
        ({"num_requests": 1, "prompt_tokens": (0, 0), "output_tokens": (0, 0)}, "would have no token"),
        ({"num_requests": 1, "shape": Shape(2, 4, 5)}, "1 <= top k <= experts"),
    ):
        with pytest.raises(ValueError, match=said):
            list(generator.sample(**wrong))
    with pytest.raises(ValueError, match="at least 4 requests"):
        judge_generator(small_trace(requests=3))


def test_files(tmp_path):
    generator = fit_generator(small_trace(), num_classes=4, run_tokens=5, crossover_rate=0.25)
    write_generator(generator, tmp_path / "g.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["g.npz"]
    read = read_generator(tmp_path / "g.npz")
    one, other = sampled(generator, 5, seed=2), sampled(read, 5, seed=2)
    np.testing.assert_array_equal(one.expert_ids_TLK, other.expert_ids_TLK)
    assert one.provenance == other.provenance and one.layers == other.layers
    whole = (tmp_path / "g.npz").read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "cut.npz").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="no trace generator"):
            read_generator(tmp_path / "cut.npz")
    write_generator(replace(generator, near_QN=generator.near_QN + 90), tmp_path / "g.npz")
    with pytest.raises(ValueError, match=r"near_QN must be int32 \[6, N\] of requests"):
        read_generator(tmp_path / "g.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="no trace generator"):
        read_generator(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="cannot write the generator"):
        write_generator(generator, tmp_path / "none" / "g.npz")


def test_commands(tmp_path):
    write_trace(small_trace(requests=8), tmp_path / "t.parquet")
    trace, fitted, out = (str(tmp_path / name) for name in ("t.parquet", "g.npz", "s.parquet"))
    run = CliRunner().invoke(cli, ["trace", "fit", trace, "-o", fitted, "--json", "--shape", "6x32x4"])
    assert run.exit_code == 0, run.output
    verdict = json.loads(run.stdout)
    assert verdict["statistics"]["load_skew_ratio"]["held-out"] >= 1 and verdict["kept"]
    run = CliRunner().invoke(cli, ["trace", "fit", trace, "--markdown"])
    assert run.exit_code == 0 and "| `load_skew_ratio`" in run.stdout
    arguments = ["trace", "sample", fitted, "-o", out, "--requests", "3", "--output-tokens", "2-4", "--scores"]
    run = CliRunner().invoke(cli, arguments)
    assert run.exit_code == 0, run.output
    made = read_trace(out)
    assert len(np.unique(made.request_T)) == 3 and made.origin == "synthetic" and made.scores_TLE is not None
    run = CliRunner().invoke(cli, [*arguments, "--shape", "6x32"])
    assert run.exit_code == 2 and "58x256x8" in run.output


def real_trace(name: str) -> RoutingTrace:
    """DeepSeek-V2-Lite prefill or gpt-oss-20b decode, from the arrays of their authors."""
    folder = DATA / {"deepseek": "routing_esft_deepseek_v2_lite", "gpt-oss": "routing_gpt_oss_20b"}[name]
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    from moesim.files.imports import import_routing

    return import_routing(sorted(folder.glob("*.npz")), name=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek", "gpt-oss"])
def test_samples_look_like_held_out_requests(name):
    """Rank imbalance, distinct experts and LRU misses within 10 % of the truth; Zipf misses the last two."""
    verdict = judge_generator(real_trace(name))
    aimed = [n for n in verdict.columns["held-out"] if verdict.within_aim(n) is not None]
    assert len(aimed) >= 12
    assert [n for n in aimed if not verdict.within_aim(n)] == []
    told_by_structure = [n for n in aimed if re.fullmatch(r"num_distinct.*|lru_miss_ratio_\d+_experts", n)]
    assert len(told_by_structure) == 4
    assert [n for n in told_by_structure if verdict.within_aim(n, "zipf")] == []
