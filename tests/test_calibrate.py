"""Calibration: laws of its pieces, recovery of known constants, blindness to what is held out, and real runs last."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import small_cluster, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.calibrate.calibration import calibrate
from moesim.calibrate.fit import fit_constants, group_weights
from moesim.calibrate.folds import fit_runs, hold_out, quantiles, shuffled_folds
from moesim.calibrate.measured import _version, load_kernels
from moesim.calibrate.parts import PARTS, Deployment, Roofline, Step, expected_distinct, iteration_parts
from moesim.calibrate.recipes import load_recipes, with_recipes
from moesim.calibrate.serving import predict_tpot_s, predict_with, price_runs, tokens_per_iteration
from moesim.cli import cli
from moesim.costs.calibration import CONSTANTS, NAMES, starting_values, with_measured_gap
from moesim.files.profiles.calibrated import load_calibration, write_calibration
from moesim.files.runs import Run
from moesim.files.runs_layouts import read_runs
from moesim.validate.cases import summary
from moesim.validate.serving import plain_roofline, validate_serving

DATA = Path(__file__).parents[1].parent / "shared" / "data"
RUNS = DATA / "serving_runs" / "serving_runs.parquet"
KERNELS = DATA / "kernels_aiconfigurator"

TRUE = dict(zip(NAMES, starting_values(), strict=True)) | {
    "gemm_factor": 1.3,
    "experts_factor": 1.2,
    "launch_factor": 0.9,
    "internode_start_factor": 12.0,
    "iteration_overhead_s": 6e-4,
    "prefill_factor": 1.2,
    "acceptance_rate": 0.6,
}


def made_runs(spread=0.0, outliers=0.0, seed=0):
    """Runs of six groups whose times follow the model with the constants `TRUE`."""
    places = [
        ("deepseek-r1", "h100_sxm", "sglang", 16, 2),
        ("deepseek-r1", "h100_sxm", "trtllm", 16, 3),
        ("deepseek-r1", "h200_sxm", "trtllm", 8, 3),
        ("gpt-oss-120b", "h200_sxm", "vllm", 1, 0),
        ("gpt-oss-120b", "h100_sxm", "vllm", 4, 0),
        ("gpt-oss-120b", "b200_sxm", "trtllm", 2, 0),
    ]
    runs = []
    for model, system, backend, tp, drafts in places:
        for prompt, output in ((1024, 1024), (1024, 8192), (8192, 1024)):
            for concurrency in (1, 4, 16, 64):
                for n in {0, drafts}:
                    name = f"{model} {system} {backend} {prompt} {output} {concurrency} {n}"
                    runs.append(
                        Run(name, model, system, backend, prompt, output, concurrency, tp, 1.0, etp=tp,
                            num_draft_tokens=n, is_disaggregated=bool(drafts))
                    )  # fmt: skip
    priced = price_runs(runs)
    times = predict_tpot_s(priced, np.array([TRUE[name] for name in NAMES]))
    rng = np.random.default_rng(seed)
    times = times * np.exp(spread * rng.standard_normal(len(times)))
    times[rng.permutation(len(times))[: int(outliers * len(times))]] *= 3.0
    return dataclasses.replace(
        priced,
        runs=tuple(dataclasses.replace(r, tpot_s=float(t)) for r, t in zip(runs, times, strict=True)),
        tpot_s_N=times,
    )


# Parts of an iteration


@given(st.integers(2, 12), st.integers(1, 4), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_expected_distinct_is_the_mean_over_random_choices(experts, top_k, tokens):
    top_k = min(top_k, experts)
    rng = np.random.default_rng(0)
    draws = [len(set().union(*(rng.permutation(experts)[:top_k].tolist() for _ in range(tokens)))) for _ in range(300)]
    assert expected_distinct(experts, top_k, tokens) == pytest.approx(np.mean(draws), rel=0.1)


def deployment(dp=1, tp=1, ep=1, etp=1, nodes=1):
    return Deployment(small_model(shared=64), small_cluster(nodes=nodes), dp, tp, ep, etp, "bf16")


def test_more_work_never_costs_less():
    kernels = Roofline(small_cluster())
    last = dict.fromkeys(PARTS, 0.0)
    for tokens in (1, 2, 8, 64, 512):
        parts = iteration_parts(deployment(tp=4, etp=4), Step(tokens, tokens, 1000.0), kernels)
        assert all(parts[name] >= last[name] for name in PARTS)
        last = parts


def test_one_rank_has_no_collectives_and_more_ranks_do():
    step = Step(8.0, 8.0, 100.0)
    alone = iteration_parts(deployment(), step, Roofline(small_cluster()))
    cut = iteration_parts(deployment(tp=4, etp=4), step, Roofline(small_cluster()))
    assert alone["collective"] == alone["collective_start"] == 0.0
    assert cut["collective"] > 0 and cut["collective_start"] > 0
    assert cut["gemm"] < alone["gemm"] and cut["experts"] < alone["experts"]


def test_data_parallel_attention_computes_the_experts_of_all_ranks_and_reads_its_own_cache():
    step = Step(8.0, 8.0, 1000.0)
    kernels = Roofline(small_cluster())
    spread = iteration_parts(deployment(dp=4, ep=4), step, kernels)
    alone = iteration_parts(deployment(), step, kernels)
    assert spread["attention"] == alone["attention"]
    together = iteration_parts(deployment(ep=4, tp=4), Step(32.0, 32.0, 1000.0), kernels)
    assert spread["experts"] == pytest.approx(together["experts"])


def test_an_all_reduce_between_nodes_costs_more_than_inside_one_and_less_than_all_over_the_nics():
    cluster = small_cluster(nodes=2)
    inside, between = (Roofline(cluster).allreduce_s(1e8, size)[0] for size in (4, 8))
    slowest = 2 * 1e8 / (cluster.scale_out.bytes_per_s * 0.5)
    assert inside < between < slowest


def test_tokens_are_sent_to_their_experts_only_between_nodes():
    two = small_cluster(nodes=2)
    wide = Deployment(small_model(), two, 8, 1, 8, 1, "bf16")
    narrow = dataclasses.replace(wide, dp=4, ep=4)
    assert wide.sends_tokens and not narrow.sends_tokens
    assert not dataclasses.replace(wide, dp=1, tp=8).sends_tokens
    ffn, kernels = wide.model.experts, Roofline(two)
    once, twice = (kernels.exchange_s(ffn, tokens, wide)[0] for tokens in (16.0, 32.0))
    # Of two choices among two nodes, 1 - 1/4 of the nodes are reached each; one byte out and two back, half of it far.
    reached = 2 * (1 - 0.5**2) / 2
    assert once == pytest.approx(3 * 16 * reached * 128 / (two.scale_out.bytes_per_s * 0.5))
    assert twice == pytest.approx(2 * once)


# Tokens of an iteration


@given(st.integers(0, 5), st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_tokens_per_iteration_is_the_mean_of_drafts_accepted_in_a_row(drafts, rate):
    expected = sum(rate**i for i in range(drafts + 1))
    got = tokens_per_iteration(np.array([float(drafts)]), np.array([1024.0]), rate, 0.3)[0]
    assert got == pytest.approx(expected)


def test_longer_outputs_accept_more():
    short, long = tokens_per_iteration(np.full(2, 3.0), np.array([1024.0, 8192.0]), 0.6, 0.5)
    assert 1 < short < long < 4


# The fit


def test_a_fit_finds_the_constants_that_made_the_runs_among_outliers():
    priced = made_runs(spread=0.02, outliers=0.1)
    values = dict(zip(NAMES, fit_runs(priced), strict=True))
    for name in ("experts_factor", "launch_factor", "internode_start_factor", "acceptance_rate"):
        assert values[name] == pytest.approx(TRUE[name], rel=0.1), name
    assert values["iteration_overhead_s"] == pytest.approx(TRUE["iteration_overhead_s"], rel=0.3)
    clean = made_runs()
    off = predict_tpot_s(clean, np.array([values[name] for name in NAMES])) / clean.tpot_s_N - 1
    assert np.percentile(abs(off), 95) < 0.04  # least squares of the logarithms would be off by 10 % and more


def test_without_noise_the_fit_explains_every_run():
    clean = made_runs()
    off = predict_tpot_s(clean, fit_runs(clean)) / clean.tpot_s_N - 1
    assert abs(off).max() < 0.02


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_constants_stay_in_their_physical_ranges(factor):
    priced = made_runs()
    absurd = dataclasses.replace(priced, tpot_s_N=priced.tpot_s_N * factor)
    values = fit_runs(absurd)
    for constant, value in zip(CONSTANTS, values, strict=True):
        assert constant.low <= value <= constant.high
    assert sum(min(v / c.low, c.high / v) < 1.01 for c, v in zip(CONSTANTS, values, strict=True)) >= 4


def test_a_constant_no_run_speaks_of_stays_where_it_started():
    priced = made_runs().take([i for i, run in enumerate(made_runs().runs) if "gpt-oss" in run.model])
    values = dict(zip(NAMES, fit_runs(priced), strict=True))
    start = dict(zip(NAMES, starting_values(), strict=True))
    for name in ("acceptance_rate", "acceptance_gain", "internode_start_factor"):
        assert values[name] == pytest.approx(start[name])


def test_one_factor_is_fitted_as_a_plain_search_would():
    constant = dataclasses.replace(CONSTANTS[0], spread=100.0)
    measured = np.array([1.9, 2.0, 2.1, 2.05, 40.0])
    got = fit_constants(lambda values: np.full(5, values[0]), measured, [constant])[0]
    grid = np.linspace(1.8, 2.5, 2001)
    error = np.abs(np.log(measured[None, :] / grid[:, None]))
    huber = np.where(error < 0.1, error**2, 0.2 * error - 0.01).sum(axis=1)
    assert got == pytest.approx(grid[huber.argmin()], abs=1e-3)


def test_a_large_group_counts_no_more_than_its_share():
    weights = group_weights(["a"] * 400 + ["b"] * 10)
    assert weights[:400].sum() == pytest.approx(40) and weights[400:].sum() == 10


# What is held out


def test_a_group_that_is_held_out_never_touches_its_own_predictions():
    priced = made_runs(spread=0.05)
    folds = [run.group for run in priced.runs]
    before = hold_out(priced, folds)
    target = np.array([fold == folds[0] for fold in folds])
    changed = dataclasses.replace(priced, tpot_s_N=np.where(target, priced.tpot_s_N * 3, priced.tpot_s_N))
    after = hold_out(changed, folds)
    for name in ("predicted_s_N", "low_s_N", "high_s_N"):
        assert np.array_equal(getattr(before, name)[target], getattr(after, name)[target]), name
        assert not np.allclose(getattr(before, name)[~target], getattr(after, name)[~target]), name


def test_intervals_cover_what_scatters_like_the_others():
    priced = made_runs(spread=0.08, seed=3)
    held = hold_out(priced, [run.group for run in priced.runs])
    covered = (held.low_s_N <= priced.tpot_s_N) & (priced.tpot_s_N <= held.high_s_N)
    assert 0.82 <= covered.mean() <= 0.98
    assert (held.low_s_N <= held.predicted_s_N).all() and (held.predicted_s_N <= held.high_s_N).all()


def test_quantiles_weigh_folds_and_always_hold_the_prediction():
    assert quantiles(np.array([0.1, 0.2, 0.3]))[0] == 0.0
    heavy = quantiles(np.concatenate([np.full(100, 0.0), np.full(10, 0.5)]), np.repeat([0.01, 0.1], [100, 10]))
    assert heavy[1] == pytest.approx(0.5)


def test_runs_of_one_configuration_share_a_fold():
    folds = shuffled_folds(["a", "b", "a", "c", "d", "e", "f", "b"])
    assert folds[0] == folds[2] and folds[1] == folds[7] and len(set(folds)) == 5


def test_two_groups_are_too_few_to_hold_out():
    priced = made_runs()
    with pytest.raises(ValueError, match="at least 3 groups, given 2"):
        hold_out(priced, ["a" if i % 2 else "b" for i in range(len(priced.runs))])


# Profiles


def test_a_profile_is_kept_and_predicts_with_its_interval(tmp_path):
    priced = made_runs(spread=0.05)
    profile, _ = calibrate(priced, "roofline")
    write_calibration(profile, tmp_path / "p.toml")
    again = load_calibration(tmp_path / "p.toml")
    assert again == profile
    assert [path.name for path in tmp_path.iterdir()] == ["p.toml"]
    predicted, low, high = predict_with(again, priced)
    assert np.allclose(predicted, predict_tpot_s(priced, fit_runs(priced)))
    assert np.allclose(low / predicted, profile.low_ratio) and np.allclose(high / predicted, profile.high_ratio)
    assert all(source.startswith("fitted: ") for source in profile.sources.values())


def test_few_groups_are_judged_by_configuration():
    whole = made_runs(spread=0.05)
    two = whole.take([i for i, run in enumerate(whole.runs) if "gpt-oss" in run.model and run.system != "b200_sxm"])
    profile, _ = calibrate(two, "roofline")
    assert profile.facts["held_out_by"] == "configuration"
    assert profile.sources["acceptance_rate"].startswith("assumed: ")


def test_every_mistake_of_a_profile_is_told_at_once(tmp_path):
    path = tmp_path / "p.toml"
    write_calibration(calibrate(made_runs(), "roofline")[0], path)
    text = (
        path.read_text()
        .replace("format = 1", "format = 9")
        .replace("[constants.gemm_factor]", "[constants.gem_factor]")
    )
    path.write_text(text)
    with pytest.raises(ValueError, match=r"(?s)format must be 1, not 9.*gemm_factor.*gem_factor is not known"):
        load_calibration(path)


def test_a_measured_gap_is_believed_more_than_the_start():
    tight = with_measured_gap(CONSTANTS, 2e-3)
    value = {c.name: (c.value, c.spread) for c in tight}["iteration_overhead_s"]
    assert value == (2e-3, 0.2)
    with pytest.raises(ValueError, match="no serving loop"):
        with_measured_gap(CONSTANTS, 1.0)


# Recipes


def disaggregated(name, tpot_s, concurrency=48.0, prompt=8192.0):
    return Run(
        name, "deepseek-r1", "h200_sxm", "trtllm", prompt, 1024.0, concurrency, 8, tpot_s, "0.8.1.post1", True, ep=8
    )


def test_the_fastest_of_one_concurrency_has_the_most_drafts():
    found = with_recipes([disaggregated(*run) for run in [("d", 0.021), ("a", 0.0085), ("c", 0.0168), ("b", 0.0124)]])
    facts = {run.name: (run.num_draft_tokens, run.num_instances) for run in found}
    assert facts == {"a": (3, 6), "b": (2, 3), "c": (0, 6), "d": (0, 3)}
    assert all(run.is_told_by_time for run in found)
    assert all(run.kv_dtype == "fp8" for run in found)


def test_a_concurrency_of_one_recipe_needs_no_time():
    found = with_recipes([disaggregated("a", 0.033, 192.0), disaggregated("b", 0.05, 192.0)])
    assert all((run.dp, run.tp, run.num_instances, run.max_requests_per_rank) == (8, 1, 3, 128) for run in found)
    assert not any(run.is_told_by_time for run in found)


def test_what_cannot_be_told_is_left_alone():
    alone = with_recipes([disaggregated("a", 0.0085)])[0]
    assert (alone.num_draft_tokens, alone.num_instances, alone.max_requests_per_rank) == (0, 1, None)


def test_mistakes_of_recipes_are_told_at_once(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("[[recipe]]\nwhen = { mdel = 1 }\nset = { drafts = 1 }\n[[recipe]]\npoints = [[1, 2]]\n")
    with pytest.raises(ValueError, match=r"(?s)when.mdel is not known.*set.drafts is no fact.*each point must be"):
        load_recipes(path)


# Measured kernels


def write_table(folder, name, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(columns.values())))
    columns = {"device": ["x"] * rows, "op_name": [name.removesuffix("_perf")] * rows} | columns
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")


MOE = {"hidden_size": 128, "inter_size": 64, "topk": 2, "num_experts": 8, "moe_tp_size": 1, "moe_ep_size": 1}


def moe_rows(milliseconds, **more):
    """Two rows of experts of `small_model`, or of others."""
    shape = {name: [value] * 2 for name, value in (MOE | {"distribution": "power_law_1.01"} | more).items()}
    return {"moe_dtype": ["bfloat16"] * 2, "num_tokens": [1, 16], **shape, "latency": milliseconds}


@pytest.fixture
def kernels(tmp_path):
    root = tmp_path / "data" / "h200_sxm"
    write_table(
        root / "gemm" / "vllm" / "1.0", "gemm_perf", gemm_dtype=["bfloat16"] * 4, m=[1, 16, 1, 16],
        n=[64, 64, 512, 512], k=[64, 64, 512, 512], latency=[0.001, 0.004, 0.008, 0.032],
    )  # fmt: skip
    old = {"gemm_dtype": ["bfloat16"], "m": [1], "n": [64], "k": [64], "latency": [9.0]}
    write_table(root / "gemm" / "vllm" / "0.9", "gemm_perf", **old)
    write_table(
        root / "comm" / "vllm" / "1.0", "custom_allreduce_perf", kernel_source=["x_graph", "x_graph", "x_eager"],
        allreduce_dtype=["bfloat16"] * 3, op_name=["all_reduce"] * 3, num_gpus=[2, 2, 2],
        message_size=[1024, 4096, 1024], latency=[0.004, 0.006, 0.020],
    )  # fmt: skip
    shape = {"num_token": [1, 16], "hidden_size": [128] * 2, "num_topk": [2] * 2, "num_experts": [8] * 2}
    for version, nodes in (("0.9", 2), ("1.0", 1)):
        times = {f"{name}_transmit_us": [10.0, 20.0] for name in ("dispatch", "combine")}
        times |= {f"{name}_notify_us": [500.0, 900.0] for name in ("dispatch", "combine")}
        sms = {"dispatch_sms": [20] * 2, "combine_sms": [20] * 2, "node_num": [nodes] * 2, "op_name": ["normal"] * 2}
        write_table(root / "comm" / "sglang" / version, "wideep_deepep_normal_perf", **shape, **sms, **times)
    return tmp_path


def h200(make, backend="vllm", cluster=None):
    run = dataclasses.replace(made_runs().runs[-1], system="h200_sxm", backend=backend)
    return make(cluster or small_cluster(), run)


def test_an_exchange_comes_from_the_newest_version_with_that_many_nodes_without_waiting_for_the_late(kernels):
    cluster = small_cluster(nodes=2)
    made, wide = h200(load_kernels(kernels), "trtllm", cluster), Deployment(small_model(), cluster, 8, 1, 8, 1, "bf16")
    ffn, start_s = wide.model.experts, Roofline(cluster).exchange_s(small_model().experts, 1.0, wide)[1]
    assert made.exchange_s(ffn, 1.0, wide) == (pytest.approx(20e-6), start_s)
    assert 20e-6 < made.exchange_s(ffn, 4.0, wide)[0] < 40e-6


def test_experts_are_of_the_models_own_shape_the_runs_backend_first_and_skewed_before_even(kernels):
    root, one = kernels / "data" / "h200_sxm" / "moe", deployment()

    def seconds(backend):
        return h200(load_kernels(kernels), backend).experts_s(one.model.experts, 16.0, one)

    write_table(root / "sglang" / "1.0", "moe_perf", **moe_rows([0.1, 0.5]))
    write_table(root / "vllm" / "1.0", "moe_perf", **moe_rows([0.1, 0.7], distribution="balanced"))
    assert seconds("sglang") == seconds("vllm") == pytest.approx(5e-4)
    write_table(root / "vllm" / "2.0", "moe_perf", **moe_rows([0.1, 0.2], inter_size=96))
    assert seconds("vllm") == pytest.approx(5e-4)
    write_table(root / "vllm" / "1.5", "moe_perf", **moe_rows([0.1, 0.3]))
    assert seconds("vllm") == pytest.approx(3e-4) and seconds("sglang") == pytest.approx(5e-4)


def test_attention_is_of_the_models_own_heads_and_window_and_never_below_the_roofline(kernels):
    shape = {"num_heads": 8, "num_key_value_heads": 8, "head_dim": 16, "kv_cache_dtype": "bfloat16", "isl": 1}
    rows = {name: [value] * 6 for name, value in shape.items()} | {"batch_size": [1, 1, 8, 8, 8, 8]}
    rows |= {"num_heads": [8] * 4 + [4] * 2, "step": [63, 1023] * 3, "latency": [1.0, 2.0, 3.0, 4.0, 90.0, 90.0]}
    place = kernels / "data" / "h200_sxm" / "attention" / "vllm" / "1.0"
    write_table(place, "generation_attention_perf", **rows)
    made, one = h200(load_kernels(kernels)), deployment()
    mixer = one.model.layers[0].mixer
    assert made.attention_s(mixer, Step(8.0, 8.0, 1024.0), one) == pytest.approx(4e-3)
    assert made.attention_s(mixer, Step(1.0, 1.0, 64.0), one) == pytest.approx(1e-3)
    many = Step(8e6, 8.0, 1024.0)
    assert made.attention_s(mixer, many, one) == Roofline(small_cluster()).attention_s(mixer, many, one) > 4e-3
    windowed = dataclasses.replace(mixer, window=128)
    step = Step(8.0, 8.0, 1024.0)
    assert made.attention_s(windowed, step, one) == Roofline(small_cluster()).attention_s(windowed, step, one)


def test_profiles_that_were_imported_give_the_same_kernels(kernels, tmp_path):
    write_table(kernels / "data" / "a100_sxm" / "moe" / "vllm" / "1.0", "moe_perf", **moe_rows([0.1, 0.5]))
    write_table(kernels / "data" / "h200_sxm" / "moe" / "vllm" / "1.0", "moe_perf", **moe_rows([0.1, 0.3]))
    out = tmp_path / "profiles"
    for folder in (kernels, kernels / "data"):
        told = CliRunner().invoke(cli, ["profile", "import", str(folder), "-o", str(out)], catch_exceptions=False)
        assert told.exit_code == 0 and len(told.stdout.splitlines()) == 7 == len([*out.glob("*/*/*.parquet")])
    assert (out / "h200_sxm" / "vllm-0.9" / "gemm.parquet").is_file()
    cluster = small_cluster(nodes=2)
    wide = Deployment(small_model(), cluster, 8, 1, 8, 1, "bf16")
    one, (mine, theirs) = deployment(), (h200(load_kernels(path), "vllm", cluster) for path in (out, kernels))
    for made in (mine, theirs):
        assert made.experts_s(one.model.experts, 16.0, one) == pytest.approx(3e-4)
    assert mine.gemm_s(4, 64, 64, "bf16") == theirs.gemm_s(4, 64, 64, "bf16")
    assert mine.allreduce_s(5000.0, 2) == theirs.allreduce_s(5000.0, 2)
    assert mine.exchange_s(wide.model.experts, 4.0, wide) == theirs.exchange_s(wide.model.experts, 4.0, wide)
    with pytest.raises(ValueError, match="no measured table of b200_sxm"):
        load_kernels(out)(small_cluster(), made_runs().runs[-1])


def test_a_copy_of_another_systems_table_is_left_out_even_where_that_system_was_not_asked_for(kernels):
    data = kernels / "data"
    place = data / "h100_sxm" / "comm" / "sglang" / "0.9"
    place.mkdir(parents=True)
    copied = data / "h200_sxm" / "comm" / "sglang" / "0.9" / "wideep_deepep_normal_perf.parquet"
    (place / copied.name).write_bytes(copied.read_bytes())
    cluster = small_cluster(nodes=2)
    wide = Deployment(small_model(), cluster, 8, 1, 8, 1, "bf16")
    made, plain = h200(load_kernels(kernels), "sglang", cluster), Roofline(cluster)
    assert made.exchange_s(wide.model.experts, 4.0, wide) == plain.exchange_s(wide.model.experts, 4.0, wide)


def test_measured_kernels_are_read_from_the_newest_version_and_interpolated(kernels):
    made = h200(load_kernels(kernels))
    assert made.gemm_s(1, 64, 64, "bf16") == pytest.approx(1e-6)
    assert made.gemm_s(16, 512, 512, "bf16") == pytest.approx(32e-6)
    assert 1e-6 < made.gemm_s(4, 64, 64, "bf16") < 4e-6
    assert made.allreduce_s(2 * 4096, 2) == (pytest.approx(2e-6), pytest.approx(4e-6))


def test_one_system_of_one_node_and_of_two_has_two_networks(kernels):
    make, two = load_kernels(kernels), small_cluster(nodes=2)
    assert h200(make).allreduce_s(1e6, 4) == Roofline(small_cluster()).allreduce_s(1e6, 4)
    assert h200(make, cluster=two).allreduce_s(1e6, 8) == Roofline(two).allreduce_s(1e6, 8)


def test_what_no_table_holds_is_the_roofline(kernels):
    made, plain = h200(load_kernels(kernels)), Roofline(small_cluster())
    step = Step(4.0, 4.0, 100.0)
    one = deployment()
    assert made.gemm_s(8, 64, 64, "fp8") == plain.gemm_s(8, 64, 64, "fp8")
    assert made.experts_s(one.model.experts, 8.0, one) == plain.experts_s(one.model.experts, 8.0, one)
    assert made.attention_s(one.model.layers[0].mixer, step, one) == plain.attention_s(
        one.model.layers[0].mixer, step, one
    )
    assert made.allreduce_s(1e6, 4) == plain.allreduce_s(1e6, 4)


def test_a_folder_without_tables_of_a_system_is_refused(kernels):
    with pytest.raises(ValueError, match=r"TABLE.parquet of b200_sxm.*give the folder of systems"):
        load_kernels(kernels)(small_cluster(), made_runs().runs[-1])


def test_versions_are_ordered_as_numbers():
    versions = ["1.3.0", "1.3.0rc20", "0.5.6.post2", "0.5.14", "0.5.6", "1.3.0rc10", "0.24.0"]
    ordered = ["0.5.6", "0.5.6.post2", "0.5.14", "0.24.0", "1.3.0rc10", "1.3.0rc20"]
    assert [v for v in sorted(versions, key=_version) if v != "1.3.0"] == ordered


# Runs that cannot be priced


def test_unknown_models_and_machines_are_told_together():
    run = made_runs().runs[0]
    with pytest.raises(ValueError, match=r"(?s)no-model.*no-machine"):
        price_runs([dataclasses.replace(run, model="no-model"), dataclasses.replace(run, system="no-machine")])


def test_experts_in_another_format_are_read_in_it_and_labels_of_as_many_bits_change_nothing():
    run = next(run for run in made_runs().runs if run.model == "deepseek-r1")
    own, same, half = price_runs([dataclasses.replace(run, expert_dtype=d) for d in ("", "fp8", "nvfp4")]).decode_NP
    experts = PARTS.index("experts")
    assert np.array_equal(own, same)
    assert half[experts] == pytest.approx(own[experts] * 0.5625, rel=0.02)
    assert np.array_equal(np.delete(half, experts), np.delete(own, experts))


def test_requests_beyond_the_slots_wait_and_do_not_decode():
    run = dataclasses.replace(made_runs().runs[0], concurrency=64.0)
    free, limited = price_runs([run, dataclasses.replace(run, max_requests_per_rank=8)]), price_runs(
        [dataclasses.replace(run, concurrency=8.0)]
    )  # fmt: skip
    assert np.array_equal(free.decode_NP[1], limited.decode_NP[0])
    assert (free.decode_NP[0] >= free.decode_NP[1]).all()


# The commands


def as_csv(path, runs):
    rows = ["id,backend,model_path,system,mode,isl,osl,silicon_concurrency,silicon_tpot_ms,tp_size,attention_dp_size,"
            "moe_tp_size,moe_ep_size"]  # fmt: skip
    rows += [
        f"{run.name},{run.backend},x/{run.model},{run.system},agg,{run.prompt_tokens:g},{run.output_tokens:g},"
        f"{run.concurrency:g},{run.tpot_s * 1e3},{run.tp},1,{run.etp},1"
        for run in runs
    ]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def test_calibrate_prints_and_writes_what_it_found(tmp_path):
    runs = as_csv(tmp_path / "runs.csv", [run for run in made_runs(0.03).runs if run.num_draft_tokens == 0])
    out = tmp_path / "p.toml"
    result = CliRunner().invoke(cli, ["calibrate", runs, "-o", str(out), "--json"], catch_exceptions=False)
    shape = json.loads(result.stdout)
    assert shape["facts"]["runs"] == 72 and len(shape["table"]) == 72
    assert set(shape["constants"]) == set(NAMES)
    assert load_calibration(out).values == {name: c["value"] for name, c in shape["constants"].items()}
    text = CliRunner().invoke(cli, ["calibrate", runs], catch_exceptions=False).stdout
    assert "iteration_overhead_s" in text and "held out by group" in text and "no run speaks of it" in text


@pytest.mark.parametrize(
    ("name", "more", "give"),
    [("serving", [], "table of serving runs"), ("serving", ["--kernels"], "measured kernel tables"),
     ("kernels", [], "folder that holds the systems")],
)  # fmt: skip
def test_a_validation_without_its_data_is_skipped_in_one_line(tmp_path, name, more, give):
    here, absent = str(tmp_path), str(tmp_path / "none")
    asked = ["validate", name, *([here, *more, absent] if more else [absent])]
    said = CliRunner().invoke(cli, asked, catch_exceptions=False)
    assert (said.exit_code, said.stderr) == (0, "")
    assert said.stdout.startswith(f"skipped: {absent} is not there; give ") and give in said.stdout
    assert said.stdout.count("\n") == 1
    told = json.loads(CliRunner().invoke(cli, [*asked, "--json"], catch_exceptions=False).stdout)
    assert told == {"name": name, "skipped": said.stdout.removeprefix("skipped: ").strip()}


def test_validate_serving_prints_groups_and_facts(tmp_path):
    runs = as_csv(tmp_path / "runs.csv", [run for run in made_runs(0.03).runs if run.num_draft_tokens == 0])
    result = CliRunner().invoke(cli, ["validate", "serving", runs, "--json", "--closed-form"], catch_exceptions=False)
    shape = json.loads(result.stdout)
    assert shape["rows"] == 72 and shape["median_abs_error"] < 0.2 and "baseline_median_abs_error" in shape
    assert any("easier split" in name for name in shape["facts"])


def test_a_profile_predicts_other_groups_and_is_not_judged_on_its_own(tmp_path):
    timed = [run for run in made_runs(0.03).runs if run.num_draft_tokens == 0]
    mine = as_csv(tmp_path / "mine.csv", [run for run in timed if run.system != "b200_sxm"])
    every, profile = as_csv(tmp_path / "every.csv", timed), str(tmp_path / "p.toml")
    CliRunner().invoke(cli, ["calibrate", mine, "-o", profile], catch_exceptions=False)
    told = ["validate", "serving", every, "--calibration", profile, "--json", "--closed-form"]
    shape = json.loads(CliRunner().invoke(cli, told, catch_exceptions=False).stdout)
    assert shape["rows"] == 12 and {row["group"] for row in shape["table"] if not row["fitted"]} == {
        "gpt-oss-120b b200_sxm trtllm"
    }
    predicted = {row["case"]: row["predicted"] for row in shape["table"]}
    slower = as_csv(tmp_path / "every.csv", [dataclasses.replace(run, tpot_s=9 * run.tpot_s) for run in timed])
    shape = json.loads(CliRunner().invoke(cli, [*told[:2], slower, *told[3:]], catch_exceptions=False).stdout)
    assert {row["case"]: row["predicted"] for row in shape["table"]} == predicted


def test_a_profile_of_other_kernels_is_refused(kernels):
    profile = dataclasses.replace(calibrate(made_runs(), "roofline")[0], kernels="measured tables: x")
    with pytest.raises(ValueError, match="'measured tables: x'; give the same"):
        validate_serving(made_runs().runs, None, profile)


# Real runs


@pytest.fixture(scope="module")
def real_runs():
    if not RUNS.exists():
        pytest.skip("the measured serving runs are not on this machine")
    return with_recipes(read_runs(RUNS))


@pytest.mark.slow
def test_real_runs_by_rooflines(real_runs):
    found = summary(validate_serving(real_runs).cases)
    assert found["rows"] == 361 - 83  # those whose recipe was told apart by their times do not count
    assert found["median_abs_error"] < 0.18 and found["median_abs_error"] < found["baseline_median_abs_error"]
    assert 0.7 <= found["coverage_90"] <= 0.97


@pytest.mark.slow
def test_real_runs_by_measured_kernels(real_runs):
    if not KERNELS.exists():
        pytest.skip("the measured kernel tables are not on this machine")
    found = summary(validate_serving(real_runs, load_kernels(KERNELS)).cases)
    assert found["median_abs_error"] < 0.09 and found["p75_abs_error"] < 0.165
    assert 0.85 <= found["coverage_90"] <= 0.97


@pytest.mark.slow
def test_the_baseline_rests_on_no_measured_time(real_runs):
    slower = [dataclasses.replace(run, tpot_s=7 * run.tpot_s) for run in real_runs]
    assert np.array_equal(plain_roofline(real_runs), plain_roofline(slower))
