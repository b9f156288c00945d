"""Real vLLM runs: read, simulated request by request, judged by one constant of another run; the real data last."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from vllm_cases import DEVICE, ENGINE, LINK, MODEL, requests, write_profile, write_run

from moesim.cli import cli
from moesim.files.runs_vllm import read_vllm_run, read_vllm_runs
from moesim.files.scenarios import load_trace
from moesim.service import EngineConfig
from moesim.validate.vllm_runs import AIMS, FIGURES, HOST_S, MOE_RUN, Swept, validate_vllm_runs, verdict
from moesim.validate.vllm_setups import distinct_prefixes, latencies_s, setup_of

REAL = Path(__file__).parents[2] / "shared" / "data" / "serving_llmservingsim"
HOST = float(HOST_S[7])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs with the same seconds of the host, at two rates."""
    place = tmp_path_factory.mktemp("llmservingsim")
    write_profile(place / "profiler" / "perf" / DEVICE / MODEL / "bf16")
    for seed, (name, rate) in enumerate({"busy": 20.0, "calm": 2.0}.items()):
        write_run(place, name, requests(60, rate, seed), HOST)
    return place


def test_a_run_is_read_as_it_was(folder):
    run = read_vllm_run(folder / "bench" / "examples" / DEVICE / "calm")
    assert (run.name, run.model, run.device, run.version) == (f"{DEVICE}/calm", MODEL, DEVICE, "0.19.0")
    assert run.link.latency_s == pytest.approx(LINK.latency_s) and run.link.bytes_per_s == LINK.bytes_per_s
    assert (run.engine.max_num_seqs, run.engine.max_model_len) == (16, 8192)
    outcome = setup_of(folder, run.device, run.model, run.engine, run.requests, run.link).simulate(HOST)
    found = latencies_s(outcome)
    for name, measured in (("TTFT", run.ttft_s_Q), ("TPOT", run.tpot_s_Q), ("E2E", run.e2e_s_Q)):
        np.testing.assert_allclose(found[name], measured, atol=2e-5)  # arrivals are written to a microsecond or so
    assert run.theirs_s["TTFT Mean"] == pytest.approx(1.25 * run.ttft_s_Q.mean(), rel=1e-3)


def test_the_hosts_seconds_are_found_again_in_either_run(folder):
    for run in read_vllm_runs(folder):
        swept = Swept.of(run, setup_of(folder, run.device, run.model, run.engine, run.requests, run.link))
        assert HOST_S[swept.fitted()] == HOST
        assert (np.diff(swept.predicted["TPOT mean"]) > 0).all()


def test_the_fitted_run_counts_for_nothing_and_the_other_agrees(folder):
    found = validate_vllm_runs(folder, f"{DEVICE}/busy")
    assert len(found.cases) == 2 * len(FIGURES) and "0.7 ms" in found.facts["fitted"]
    for case in found.cases:
        assert case.fitted == case.case.startswith(f"{DEVICE}/busy") and case.error == pytest.approx(0, abs=1e-3)
        said = verdict(case)
        assert said.startswith("agrees") == (not case.fitted and any(case.case.endswith(name) for name in AIMS))
    baselines = {case.case: case.baseline for case in found.cases if case.baseline}
    assert set(baselines) == {f"{DEVICE}/busy TTFT mean", f"{DEVICE}/calm TTFT mean"}


def test_a_run_of_a_slower_host_differs_and_says_so(folder, tmp_path):
    place = tmp_path / "data"
    place.mkdir()
    (place / "profiler").symlink_to(folder / "profiler")
    for name, host_s in (("mine", 0.0), ("slow", 2e-2)):
        write_run(place, name, requests(30, 5.0), host_s)
    said = CliRunner().invoke(cli, ["validate", "vllm-runs", str(place), "--fit-on", f"{DEVICE}/mine"])
    assert said.exit_code == 0, said.output
    line = next(line for line in said.stdout.splitlines() if f"{DEVICE}/slow TPOT mean" in line)
    assert "differs (aim 5%)" in line and "-" in line
    assert f"{DEVICE}/mine TPOT mean" in said.stdout and "fitted" in said.stdout and "agrees" not in said.stdout
    assert "+25.0%" in next(line for line in said.stdout.splitlines() if f"{DEVICE}/slow TTFT mean" in line)


def test_prefixes_are_distinct_and_come_again_after_a_preemption(folder):
    plain = requests(40, 50.0)
    cut = distinct_prefixes(plain, 16)
    assert len(np.unique(cut.block_ids)) == len(cut.block_ids) == (plain.prompt_Q // 16).sum()
    assert cut.block_tokens == 16
    engine = EngineConfig(max_num_seqs=16, max_num_batched_tokens=2048, max_model_len=1700, num_gpu_blocks_override=300)
    outcome = setup_of(folder, DEVICE, MODEL, engine, plain, LINK).simulate(0.0)
    assert outcome.preempted_Q.sum() > 0 and outcome.cached_Q.sum() == 0
    assert (outcome.generated_Q == plain.output_Q).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"device": "A1"}, "device 'A1' is not known; one of RTX4090, RTXPRO6000"),
     ({"engine": EngineConfig(max_num_seqs=0, max_model_len=8192)}, "max_num_seqs: must be at least 1"),
     ({"model": "meta-llama/Llama-3.1-9B"}, "Llama-3.1-9B")],
)  # fmt: skip
def test_a_set_up_that_cannot_be_is_refused(folder, change, said):
    given = {"device": DEVICE, "model": MODEL, "engine": ENGINE, "requests": requests(3, 1.0), "link": LINK} | change
    with pytest.raises(ValueError, match=said):
        setup_of(folder, **given)


def test_a_run_that_is_not_there_is_asked_for_and_data_that_lacks_is_skipped(folder, tmp_path):
    with pytest.raises(ValueError, match="asked for 'A/B', given RTX4090/busy, RTX4090/calm; name one of them"):
        validate_vllm_runs(folder, "A/B")
    with pytest.raises(ValueError, match="give LLMServingSim's folder"):
        validate_vllm_runs(tmp_path)
    gone = CliRunner().invoke(cli, ["validate", "vllm-runs", str(tmp_path / "x"), "--json"], catch_exceptions=False)
    assert json.loads(gone.stdout)["skipped"].endswith("with bench, profiler and workloads")


def test_times_that_run_backwards_are_refused(folder, tmp_path):
    write_profile(tmp_path / "profiler" / "perf" / DEVICE / MODEL / "bf16")
    write_run(tmp_path, "run", requests(4, 1.0), 0.0)
    path = tmp_path / "bench" / "examples" / DEVICE / "run" / "vllm" / "requests.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["first_token_ts"] = rows[2]["queued_ts"] - 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="row 3: queued_ts <= first_token_ts <= last_token_ts must hold"):
        read_vllm_runs(tmp_path)


@pytest.fixture(scope="module")
def real():
    if not REAL.exists():
        pytest.skip("LLMServingSim's runs are not on this machine")
    return validate_vllm_runs(REAL)


@pytest.mark.slow
def test_real_dense_runs_meet_their_aims_whichever_is_fitted_to(real):
    judged = {case.case: case for case in real.cases if verdict(case)}
    assert len(judged) == 4
    assert all(verdict(case).startswith("agrees") for case in judged.values()), judged
    for other in ("RTX4090/Llama-3.1-8B", "RTXPRO6000/Qwen3-32B"):
        cases = validate_vllm_runs(REAL, other).cases
        assert all(verdict(case) == "" or verdict(case).startswith("agrees") for case in cases)


@pytest.mark.slow
def test_the_real_run_of_experts_is_predicted(real):
    found = validate_vllm_runs(REAL, trace=load_trace("olmoe-shape-16x64"))
    cases = {case.case: case for case in found.cases if case.group == MOE_RUN}
    assert len(cases) == len(FIGURES) and all(case.measured is None for case in cases.values())
    tpot = cases[f"{MOE_RUN} TPOT mean"]
    assert 0.02 < tpot.low <= tpot.predicted <= tpot.high < 0.1
    assert "sharegpt-qwen3-30b-a3b-300-sps10.csv" in found.facts[f"predicted: {MOE_RUN}"]
