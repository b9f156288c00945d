"""Readers of real runs: every layout, and what they say of broken files."""

import gzip
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cli import cli
from moesim.files.runs_layouts import read_runs
from moesim.files.runs_profiler import covered, kernel_class, read_profile

QUICKSTART = str(Path(__file__).parents[1] / "studies" / "quickstart.toml")

AGGREGATED = {
    "id": "a", "backend": "vllm", "backend_version": "0.18.0", "model_path": "openai/gpt-oss-120b",
    "system": "h100_sxm", "mode": "agg", "isl": 1024, "osl": 8192, "tp_size": 2.0,
    "attention_dp_size": 4.0, "moe_tp_size": 1.0,
    "moe_ep_size": 8.0, "silicon_concurrency": 16.0, "silicon_tpot_ms": 12.5, "silicon_ttft_ms": 300.0,
    "silicon_data_source": "bench", "measured": "2026-03-27T08:01:51Z",
}  # fmt: skip
DISAGGREGATED = AGGREGATED | {"id": "b", "mode": "disagg", "tp_size": None, "attention_dp_size": None} | {
    "moe_tp_size": None, "moe_ep_size": None, "decode_tp_size": 16.0, "decode_attention_dp_size": 1.0,
    "decode_moe_tp_size": 16.0, "decode_moe_ep_size": 1.0,
}  # fmt: skip


def table(*rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def parquet(tmp_path, *rows):
    pq.write_table(table(*rows), tmp_path / "runs.parquet")
    return tmp_path / "runs.parquet"


def test_a_table_says_the_same_as_parquet_and_as_csv(tmp_path):
    rows = (AGGREGATED, DISAGGREGATED)
    pyarrow.csv.write_csv(table(*rows), tmp_path / "runs.csv")
    runs = read_runs(parquet(tmp_path, *rows))
    assert [r.name for r in runs] == ["a", "b"]
    first, second = runs
    assert (first.model, first.group) == ("gpt-oss-120b", "gpt-oss-120b h100_sxm vllm")
    assert (first.tp, first.dp, first.etp, first.ep) == (2, 4, 1, 8)
    assert (first.tpot_s, first.ttft_s) == (pytest.approx(0.0125), pytest.approx(0.3))
    assert (second.is_disaggregated, second.tp, second.etp) == (True, 16, 16)
    from_csv = read_runs(tmp_path / "runs.csv")
    assert [(r.name, r.tp, r.dp, r.tpot_s, r.measured_on[:10]) for r in from_csv] == [
        (r.name, r.tp, r.dp, r.tpot_s, r.measured_on) for r in runs
    ]


def test_a_folder_is_all_of_its_files(tmp_path):
    with pytest.raises(ValueError, match=r"no \.parquet, \.csv, \.json or \.jsonl file of runs in it"):
        read_runs(tmp_path)
    pyarrow.csv.write_csv(table(DISAGGREGATED), tmp_path / "other.csv")
    parquet(tmp_path, AGGREGATED)
    (tmp_path / "PROVENANCE.md").write_text("from here and there")
    assert sorted(run.name for run in read_runs(tmp_path)) == ["a", "b"]


def test_a_version_in_csv_stays_a_word(tmp_path):
    pyarrow.csv.write_csv(table(AGGREGATED | {"id": "7", "backend_version": "0.8"}), tmp_path / "runs.csv")
    (run,) = read_runs(tmp_path / "runs.csv")
    assert (run.name, run.version) == ("7", "0.8")


def test_configurations_differ_in_what_was_set_and_not_in_what_was_measured(tmp_path):
    rows = [AGGREGATED, AGGREGATED | {"id": "b", "silicon_tpot_ms": 99.0}, AGGREGATED | {"id": "c", "isl": 2048}]
    names = [run.configuration for run in read_runs(parquet(tmp_path, *rows))]
    assert names[0] == names[1] != names[2]


def test_lacking_columns_are_all_named(tmp_path):
    rows = {name: value for name, value in AGGREGATED.items() if name not in ("system", "silicon_tpot_ms")}
    with pytest.raises(ValueError, match=r"(?s)column system lacks.*column silicon_tpot_ms lacks"):
        read_runs(parquet(tmp_path, rows))


def test_every_broken_row_is_told_at_once(tmp_path):
    rows = [
        AGGREGATED | {"silicon_tpot_ms": -1.0},
        AGGREGATED | {"id": "b", "mode": "split"},
        AGGREGATED | {"id": "c", "moe_ep_size": 4.0},
        AGGREGATED | {"id": "d", "backend": None},
        AGGREGATED | {"id": "e", "mode": "disagg"},
        AGGREGATED | {"id": "f"},
        AGGREGATED | {"id": "f"},
        AGGREGATED | {"id": "g", "moe_quant_mode": "nvfp5"},
    ]
    with pytest.raises(ValueError) as caught:
        read_runs(parquet(tmp_path, *rows))
    said = str(caught.value)
    for piece in (
        "runs.parquet",
        "row 0: silicon_tpot_ms must be a positive number, not -1.0", "row 1: mode must be agg or disagg",
        "row 2: attention has 4 x 2 ranks but the experts 4 x 1", "row 3: backend must be a word, not None",
        "row 4: decode_tp_size must be a positive number, not None", "'f' names 2 rows",
        "row 7: moe_quant_mode 'nvfp5' is not known",
    ):  # fmt: skip
        assert piece in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("runs.parquet", b"PAR1 not really", "not a whole parquet table"),
        ("runs.txt", b"", "must be .parquet, .csv, .json or .jsonl"),
        ("runs.json", b"{", "neither JSON nor JSON lines"),
        ("runs.json", b"[1, 2]", "must hold JSON objects"),
        ("runs.json", b'{"a": 1}', "its keys are a"),
        ("runs.json", b'{"scenario": {}, "metrics": {}}', "scenario has no model, hardware"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_runs(tmp_path / name)


@pytest.mark.parametrize("name", ["runs.parquet", "runs.json"])
def test_a_file_that_is_not_there_is_said(tmp_path, name):
    with pytest.raises(ValueError, match="no such file"):
        read_runs(tmp_path / name)


# Benchmarks

VLLM = {
    "date": "20260327-080151", "backend": "openai", "model_id": "openai/gpt-oss-120b", "num_prompts": 40,
    "request_rate": "inf", "max_concurrency": 4, "duration": 12.0, "completed": 40, "total_input_tokens": 40 * 1000,
    "total_output_tokens": 40 * 500, "mean_ttft_ms": 80.0, "mean_tpot_ms": 6.5,
}  # fmt: skip
SGLANG = {
    "backend": "sglang", "max_concurrency": None, "concurrency": 7.5, "completed": 10, "total_input_tokens": 20480,
    "total_output_tokens": 5120, "mean_ttft_ms": 90.0, "mean_tpot_ms": 9.0,
    "server_info": {"model_path": "deepseek-ai/DeepSeek-R1", "tp_size": 16, "dp_size": 8, "ep_size": 16,
                    "enable_dp_attention": True, "version": "0.5.8", "speculative_num_draft_tokens": 3},
}  # fmt: skip


def test_vllm_leaves_the_machine_to_metadata_or_to_what_is_given_beside(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(VLLM))
    with pytest.raises(ValueError, match=r"(?s)system is not in the file.*tp_size must be"):
        read_runs(path)
    (run,) = read_runs(path, {"system": "h200_sxm", "tp_size": 4})
    assert (run.model, run.system, run.backend) == ("gpt-oss-120b", "h200_sxm", "vllm")
    assert (run.prompt_tokens, run.output_tokens, run.concurrency) == (1000, 500, 4)
    assert (run.tp, run.etp, run.tpot_s, run.ttft_s) == (4, 4, pytest.approx(0.0065), pytest.approx(0.08))
    path.write_text(json.dumps(VLLM | {"system": "b200_sxm", "tp_size": 2}))
    assert read_runs(path, {"system": "h200_sxm"})[0].system == "b200_sxm"  # the file knows better


def test_sglang_counts_data_parallel_ranks_inside_tp(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps(SGLANG) + "\n" + json.dumps(SGLANG | {"mean_tpot_ms": 8.0}) + "\n")
    first, second = read_runs(path, {"system": "h100_sxm"})
    assert (first.tp, first.dp, first.ep, first.etp) == (2, 8, 16, 1)
    assert (first.num_draft_tokens, first.version, first.concurrency) == (2, "0.5.8", 7.5)
    assert first.name != second.name and second.tpot_s == pytest.approx(0.008)


def test_facts_that_are_not_known_are_refused(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(VLLM))
    with pytest.raises(ValueError, match="gpus is not known; one of model, system"):
        read_runs(tmp_path / "bench.json", {"gpus": 8})


def test_our_own_results_are_runs(tmp_path):
    short = ["--set", "workload.output_tokens=4", "--set", "workload.num_requests=16", "--engine", "estimate", "--json"]
    result = CliRunner().invoke(cli, ["run", QUICKSTART, *short], catch_exceptions=False)
    path = tmp_path / "own.json"
    path.write_text(result.stdout)
    metrics = json.loads(result.stdout)["metrics"]
    runs = read_runs(path)
    assert [run.name for run in runs] == ["own", "own tp8", "own rtx-4090-offload"]
    assert (runs[0].ep, runs[0].dp, runs[1].tp, runs[0].concurrency) == (8, 8, 8, 16)
    assert runs[0].tpot_s == metrics["tpot_s"] and runs[0].is_disaggregated
    assert 8 < runs[0].prompt_tokens < 4096 and runs[1].prompt_tokens == pytest.approx(runs[0].prompt_tokens)


# Profiler traces


def event(category, name, start_us, dur_us):
    return {"ph": "X", "cat": category, "name": name, "ts": start_us, "dur": dur_us}


EVENTS = [
    event("user_annotation", "ProfilerStep#1", 0, 100),
    event("user_annotation", "ProfilerStep#2", 100, 100),
    event("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 10, 20),
    event("kernel", "void flash::flash_fwd_splitkv_kernel", 25, 15),
    event("kernel", "fused_moe_kernel", 110, 30),
    event("kernel", "nvjet_tst_128x8_64x12", 150, 10),
    event("gpu_memcpy", "Memcpy DtoH", 165, 5),
    event("kernel", "rms_norm_kernel", 180, 5),
    event("cpu_op", "aten::mm", 0, 90),
    event("gpu_user_annotation", "ProfilerStep#1", 10, 60),
    {"ph": "M", "name": "process_name"},
]


@pytest.mark.parametrize("zipped", [False, True])
def test_a_trace_adds_up_by_class_and_leaves_the_gaps(tmp_path, zipped):
    text = json.dumps({"traceEvents": EVENTS}).encode()
    path = tmp_path / "trace.json"
    path.write_bytes(gzip.compress(text) if zipped else text)
    found = read_profile(path)
    assert found.num_steps == 2
    assert found.class_s == pytest.approx(
        {"attention": 7.5e-6, "collective": 10e-6, "copy": 2.5e-6, "experts": 15e-6, "gemm": 5e-6, "other": 2.5e-6}
    )
    assert found.span_s == pytest.approx(100e-6)
    assert found.busy_s == pytest.approx((30 + 50) / 2 * 1e-6)
    assert found.gap_s == pytest.approx(60e-6)
    named = read_profile(_named(tmp_path), "decode")
    assert named.num_steps == 1


def test_work_that_outlasts_its_iteration_keeps_the_next_one_busy(tmp_path):
    late = [event("user_annotation", f"ProfilerStep#{i}", 100 * i, 100) for i in (0, 1)]
    late += [event("kernel", "gemm", 80, 70), event("kernel", "gemm", 160, 40)]
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": late}))
    found = read_profile(tmp_path / "t.json")
    assert (found.span_s, found.busy_s) == (pytest.approx(100e-6), pytest.approx((20 + 90) / 2 * 1e-6))


def _named(tmp_path):
    path = tmp_path / "named.json"
    path.write_text(json.dumps({"traceEvents": [*EVENTS, event("user_annotation", "decode", 100, 50)]}))
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "not a Chrome trace"),
        ("{}", "not a Chrome trace"),
        (json.dumps({"traceEvents": EVENTS[2:]}), "no annotation 'ProfilerStep#n'"),
        (json.dumps({"traceEvents": EVENTS[:2]}), "no event of the categories"),
        (json.dumps({"traceEvents": [EVENTS[0], event("kernel", "k", 500, 5)]}), "no kernel starts in any of its 1"),
    ],
)
def test_broken_traces_are_refused(tmp_path, text, said):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_profile(tmp_path / "t.json")


def test_a_trace_starts_the_host_overhead_of_a_calibration(tmp_path):
    rows = [AGGREGATED | {"id": f"{s}{c}", "system": s, "silicon_concurrency": c, "silicon_tpot_ms": 3 + c**0.5 / 4}
            for s in ("h100_sxm", "h200_sxm", "b200_sxm") for c in (4.0, 16.0, 64.0)]  # fmt: skip
    runs = str(parquet(tmp_path, *rows))
    slow = [event("user_annotation", "ProfilerStep#1", 0, 2000), event("kernel", "gemm", 100, 1000)]
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": slow}))
    found = {}
    for name, more in {"without": [], "with": ["--trace", str(tmp_path / "t.json")]}.items():
        result = CliRunner().invoke(cli, ["calibrate", runs, "--json", *more], catch_exceptions=False)
        found[name] = json.loads(result.stdout)["constants"]["iteration_overhead_s"]["value"]
    gap_s = 1e-3
    assert abs(math.log(found["with"] / gap_s)) < abs(math.log(found["without"] / gap_s)) / 2


@pytest.mark.parametrize("name", ["cutlass_80_tensorop_grouped_gemm", "fused_moe_kernel", "moe_align_block_size"])
def test_kernels_of_experts_are_no_plain_products(name):
    assert kernel_class(name) == "experts"


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=12))
@settings(max_examples=50, deadline=None)
def test_covered_is_the_union(pieces):
    cells = {cell for start, dur in pieces for cell in range(start, start + dur)}
    assert covered([(float(start), float(start + dur)) for start, dur in pieces]) == len(cells)
