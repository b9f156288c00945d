"""Parts of a small real model: routing is what was asked for, caches are as long, and every cell can be timed."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="needs moesim[capture]")
pytest.importorskip("transformers", reason="needs moesim[capture]")

from moesim.cli import cli  # noqa: E402
from moesim.files.hardware import load_device  # noqa: E402
from moesim.files.profiles.tables import load_profile  # noqa: E402
from moesim.profile.cpu import Limits, jobs_with_passes  # noqa: E402
from moesim.profile.machine import one_thread  # noqa: E402
from moesim.profile.parts import ModelParts  # noqa: E402
from moesim.profile.passes import Pass, forced_ids  # noqa: E402
from moesim.profile.rounds import Lap, now  # noqa: E402
from moesim.profile.shapes import Cell, ModelShape, model_cells  # noqa: E402
from moesim.validate.this_machine import validate_this_machine  # noqa: E402

TINY = {
    family: ModelShape(f"tiny-{family}", family, 3, 64, 32, 8, 2, 4, 2, 16, 256) for family in ("mixtral", "qwen3_moe")
}
LIMITS = Limits(batch=5, context=48, tokens=32)


@pytest.fixture(scope="module", params=list(TINY))
def parts(request):
    one_thread()
    return ModelParts(TINY[request.param], 16, 48)


def test_forced_routing_is_what_the_experts_get(parts):
    run = Pass(2, 7, 0, "hot")
    ids = forced_ids(parts.shape, run, 3)
    given = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[1].numpy().copy()))
        for layer in parts.model.model.layers
    ]
    parts.pass_job("run", run.batch, run.tokens, 0, ids).prepare(0)()
    [handle.remove() for handle in handles]
    assert np.array_equal(np.stack(given), ids)


def test_forcing_what_the_model_chose_leaves_its_counts(parts):
    job = parts.pass_job("natural", 2, 9, 0, None)
    counts = parts.natural_counts(job)
    assert counts.shape == (3, 8) and (counts.sum(axis=1) == 2 * 9 * 2).all()
    assert np.array_equal(parts.natural_counts(job), counts)


def test_a_decode_pass_reads_a_cache_of_the_length_asked_for(parts):
    lengths = []
    attention = parts.model.model.layers[-1].self_attn
    handle = attention.register_forward_hook(
        lambda _module, _inputs, given, _out: lengths.append(given.get("cache", given.get("past_key_values"))),
        with_kwargs=True,
    )
    job = parts.pass_job("decode", 3, 1, 20, None)
    for turn in range(2):  # a pass leaves nothing behind
        job.prepare(turn)()
        assert lengths[-1].get_seq_length() == 21
    handle.remove()


def test_the_frame_has_neither_attention_nor_experts_and_keeps_the_head(parts):
    assert parts._frame.lm_head is parts.model.lm_head
    names = {name for name, _ in parts._frame.named_parameters()}
    assert not any("self_attn" in name or "mlp" in name for name in names)
    run = parts.job(Cell(0, "frame_prefill", (2, 8), parts.shape.name)).prepare(0)
    start = now()
    told = run()
    end = now()
    assert 0 < told.wall_s < end.wall_s - start.wall_s  # reading in place of the modules is left out


def test_every_cell_can_be_timed(parts):
    for cell in model_cells(parts.shape, LIMITS.batch, LIMITS.context, LIMITS.tokens):
        if cell.shape[0] in (1, 2, 8) or cell.op == "moe_block":
            told = parts.job(cell).prepare(0)()
            assert isinstance(told, Lap) and told.wall_s > 0 and told.cpu_s > 0


def test_a_later_model_is_dropped_first():
    cells, jobs, wholes = jobs_with_passes(list(TINY.values()), LIMITS, 2, 2, 0)
    assert len({job.key for job in jobs}) == len(jobs) == len(cells) + len(wholes)
    ranks = {name: {job.rank for job in jobs if name in job.key} for name in ("tiny-mixtral", "tiny-qwen3_moe")}
    assert ranks == {"tiny-mixtral": {1, 2}, "tiny-qwen3_moe": {3, 4}}
    assert {whole.is_closure for whole in wholes} == {False, True}
    assert all(whole.run.routing == "even" for whole in wholes if whole.is_closure)


@pytest.mark.slow
def test_a_small_model_on_this_machine_is_predicted():
    shape = ModelShape("small", "mixtral", 3, 256, 256, 8, 2, 8, 4, 32, 1024)
    limits = Limits(batch=8, context=160, tokens=96)
    found = validate_this_machine(60.0, 1, [shape], limits, num_prefill=6, num_decode=6).as_json()
    json.dumps(found)
    assert found["name"] == "this-machine" and found["rows"] == 12 == len(found["table"])
    assert found["median_abs_error"] < 0.3  # shared machines are restless
    for row in found["table"]:
        assert 0 < row["low"] < row["predicted"] < row["high"] and row["measured"] > 0 and row["baseline"] > 0
        assert not row["fitted"] and row["group"].split(", ")[0] in ("prefill", "decode")
    facts = found["facts"]
    assert facts["threads"] == 1 and facts["rounds"] >= 1 and facts["seconds"] < 120
    assert {"cpu", "torch", "run_to_run_spread_cpu", "run_to_run_spread_wall", "wall_median_abs_error"} <= set(facts)


@pytest.mark.slow
def test_a_profile_is_written_and_gone_on_with(tmp_path):
    command = ["profile", "run", "--model", "qwen3-moe-6x32-h768", "-o", str(tmp_path), "--budget"]
    result = CliRunner().invoke(cli, [*command, "5"])
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(tmp_path / "tables.parquet"), str(tmp_path / f"{tmp_path.name}.toml")]
    assert "dropped" in result.stderr
    tables = load_profile(tmp_path / "tables.parquet")
    gemm = tables.find("gemm", "fp32")
    assert gemm.axes == ("m", "n", "k") and gemm.low_N is not None and gemm.provenance["cores"]
    assert tables.find("moe_block", "fp32", model="qwen3-moe-6x32-h768") is not None
    assert load_device(str(tmp_path / f"{tmp_path.name}.toml")).flops_per_s["fp32"] > 1e9
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert CliRunner().invoke(cli, [*command, "10"]).exit_code == 0
    assert (tmp_path / "samples.jsonl").read_text().splitlines()[: len(lines)] == lines
    refused = CliRunner().invoke(cli, [*command, "5", "--seed", "1"])
    assert isinstance(refused.exception, ValueError) and "another profile" in str(refused.exception)


def test_unknown_models_are_named(tmp_path):
    error = CliRunner().invoke(cli, ["profile", "run", "--model", "qwen3", "-o", str(tmp_path)]).exception
    assert isinstance(error, ValueError) and "qwen3-moe-6x32-h768" in str(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_that_is_said(tmp_path):
    error = CliRunner().invoke(cli, ["profile", "run", "--device", "cuda", "-o", str(tmp_path)]).exception
    assert isinstance(error, ValueError) and "no CUDA device" in str(error)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    """In a process of its own, as the C library is told once and for all: no page comes anew."""
    code = """
import resource
from moesim.profile.machine import keep_freed_memory
KEEP
import numpy as np
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [np.ones(5_000_000) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def faults(keep):
        ran = subprocess.run([sys.executable, "-c", code.replace("KEEP", keep)], capture_output=True, check=True)
        return int(ran.stdout)

    assert faults("keep_freed_memory()") < faults("") / 2
