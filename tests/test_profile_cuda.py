"""The CUDA profiler without a CUDA device: its grid, calls, choice of tiles, ceilings, files, and forward passes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from triton_interpreter import interpreted

from moesim import load, run
from moesim.cli import cli
from moesim.costs.operators import Operators
from moesim.files.hardware import load_device
from moesim.files.models import load_model
from moesim.files.profiles.tables import load_profile
from moesim.mixers import Attention, LatentAttention
from moesim.profile.ceilings import ceilings
from moesim.profile.cuda_cells import cell_work, chosen_experts, cuda_cells, kernel_of, without_kernel
from moesim.profile.cuda_device import DeviceInfo, driver_and_power
from moesim.profile.cuda_results import fastest, write_results
from moesim.profile.forward_times import COLUMNS, Forward
from moesim.profile.rounds import Job, Lap, Samples, time_rounds
from moesim.profile.shapes import AXES, Cell

torch = pytest.importorskip("torch", reason="the profiler needs torch: moesim[capture]")

QUICKSTART = Path(__file__).parents[1] / "studies" / "quickstart.toml"
INFO = DeviceInfo("made-up GPU", 90, 80 << 30, None, True, "570.86")
FACTS = {"torch": "2", "transformers": "5", "device": "cuda", **INFO.facts}
MADE = "made_gpu"


def made_seconds(cell: Cell) -> float:
    """Launch floor and roofline of a made-up device, at other fractions of it for each kernel."""
    slower = {"torch": 1.3, "triton": 1.2, "triton_decode": 1.1}.get(kernel_of(cell), 1.0)
    if not cell.shape:
        return 3e-6
    amount = cell_work(cell)
    return 4e-6 + slower * max(amount.flops / 800e12, amount.num_bytes / 3e12)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("profiles") / MADE
    out.mkdir()
    cells = cuda_cells(90, has_triton=True)
    samples = Samples(laps={cell.key: [Lap(made_seconds(cell) * f, 9.0) for f in (0.99, 1, 1.02)] for cell in cells})
    runs = [Forward("olmoe-1b-7b", 4, 8, 1, 128, "streamed"), Forward("olmoe-1b-7b", 4, 1, 128, 0, "resident")]
    samples.laps[runs[0].key] = [Lap(0.25, 0.25), Lap(0.5, 0.5), Lap(1.0, 1.0)]
    results = write_results(out, cells, samples, {cells[-1].key: "a tile"}, FACTS, INFO, runs)
    return out, cells, samples, results


def test_the_grid_is_known_to_the_cost_model_and_has_no_cell_twice():
    cells = cuda_cells(90, has_triton=True)
    assert len({cell.key for cell in cells}) == len(cells)
    assert all(len(cell.shape) == len(AXES[cell.op]) for cell in cells)
    assert {"bf16", "fp8_block", "int4"} == {cell.dtype for cell in cells if cell.op == "moe"}
    assert all(min(cell_work(cell)) >= 0 < max(cell_work(cell)) for cell in cells if cell.shape)
    older, bare = cuda_cells(80, has_triton=True), cuda_cells(90, has_triton=False)
    assert {cell.dtype for cell in cells} - {cell.dtype for cell in older} == {"fp8", "fp8_block"}
    assert {kernel_of(cell) for cell in bare} == {"", "torch"}


def test_experts_are_chosen_as_said():
    one = chosen_experts(32, 4, 16, "one_set")
    assert one.shape == (32, 4) and np.unique(one).tolist() == [0, 1, 2, 3]
    even, skewed = (np.bincount(chosen_experts(4096, 4, 16, d).ravel(), minlength=16) for d in ("uniform", "zipf_1.2"))
    assert even.sum() == skewed.sum() == 4096 * 4
    assert even.max() < 1.15 * even.min() and skewed[0] > 4 * skewed[15]
    assert all(len(set(row)) == 4 for row in chosen_experts(64, 4, 16, "zipf_1.2").tolist())


def test_ceilings_of_timings_one_can_reckon_by_hand():
    def cell(op, shape, kernel, dtype="bf16", **facts):
        return Cell(1, op, shape, dtype=dtype, facts=(*facts.items(), ("kernel", kernel)))

    one = (1, 100, 50, 2, 4, 1, 1)  # 1 token at 2 of 4 experts: 6 x 2 x 5000 FLOP
    two = (4, 100, 50, 2, 4, 1, 1)
    attention = (1, 100, 4, 2, 10)  # 2 bytes x 2 x 100 x 2 x 10
    seconds = {
        cell("copy", (1000,), "torch"): 2.0,  # 2000 bytes: 1000 bytes/s
        cell("copy", (1000,), "triton"): 4.0,
        cell("copy", (10,), "triton"): 0.001,  # quicker, but in a cache
        cell("gemm", (10, 10, 10), "torch"): 1.0,  # 2000 FLOP/s
        cell("moe", one, "torch", distribution="uniform"): 80.0,
        cell("moe", one, "triton", distribution="uniform"): 100.0,
        cell("moe", one, "triton_decode", distribution="uniform"): 80.0,
        cell("moe", two, "torch", distribution="uniform"): 100.0,
        cell("moe", two, "triton", distribution="uniform"): 125.0,
        cell("generation_attention", attention, "triton"): 16.0,
        Cell(0, "launch", ()): 1.0,
    }
    found = ceilings(seconds, {cell("moe", one, "triton", distribution="uniform").key: "tile 7"})
    assert found.copy_bytes_per_s == 1000 and found.matrix_flops_per_s == {"bf16": 2000}
    assert len(found.rows) == 10  # the launch has no ceiling
    by = {(row.op, row.kernel, row.shape): row for row in found.rows}
    triton = by["moe", "triton", one]
    assert triton.tile == "tile 7" and triton.library_ratio == pytest.approx(0.8)
    assert triton.flops_per_s == pytest.approx(600) and triton.matrix_fraction == pytest.approx(0.3)
    num_bytes = 3 * 2 * 5000 * 2 + 2 * (4 * 100 + 6 * 50)
    assert triton.bytes_per_s == pytest.approx(num_bytes / 100) and triton.copy_fraction == pytest.approx(0.614)
    assert by["moe", "torch", one].library_ratio is None
    assert by["copy", "triton", (1000,)].copy_fraction == 0.5 and by["copy", "triton", (1000,)].matrix_fraction is None
    assert found.moe_library_rate == 0.5  # one: the kernel for decode is as fast; two: slower
    decode = (num_bytes / 80 / 1000, 8000 / 16 / 1000)
    assert found.decode_copy_fraction == pytest.approx(np.median(decode))
    assert "at or above the library: 50% (aim 80%)" in found.table()
    assert json.loads(json.dumps(found.as_json()))["aims"] == {"moe_library_rate": 0.8, "decode_copy_fraction": 0.85}
    nothing = ceilings({})
    assert nothing.rows == () and nothing.moe_library_rate is None and "not timed" in nothing.table()


def test_the_fastest_kernel_goes_into_the_tables(made):
    _, cells, samples, _ = made
    places, merged = fastest(cells, samples)
    best = {}
    for cell in cells:
        best[without_kernel(cell)] = min(best.get(without_kernel(cell), 1.0), made_seconds(cell))
    assert set(places) == set(best)
    assert all(np.median([lap.wall_s for lap in merged.laps[c.key]]) == pytest.approx(best[c]) for c in places)


def test_the_cost_model_takes_what_was_timed(made):
    out, cells, _, _ = made
    tables, device = load_profile(out), load_device(str(out / f"{MADE}.toml"))
    assert {table.device for table in tables.tables} == {MADE} == {device.name}
    ops = Operators(device, "value", tables)

    def best(op, shape, dtype="bf16", **facts):
        alike = [c for c in cells if (c.op, c.shape, c.dtype) == (op, shape, dtype)]
        return min(made_seconds(c) for c in alike if facts.items() <= dict(c.facts).items())

    def check(timed, seconds):
        assert np.squeeze(timed.seconds) == pytest.approx(seconds, rel=1e-6)
        assert timed.shares_X.tolist() == [1, 0, 0, 0]

    check(ops.matmuls([(14336, 4096)], np.array([64.0]), "bf16", 2.0), best("gemm", (64, 14336, 4096)))
    one = np.array([1.0])
    amount = cell_work(Cell(0, "generation_attention", (16, 1024, 32, 4, 128), dtype="bf16"))
    mixer, tokens = Attention(32, 4, 128), 16 * 1024 * one
    timed = ops.attention_core(mixer, "decode", 16 * one, tokens, amount.flops * one, amount.num_bytes * one, 1, "bf16")
    check(timed, best("generation_attention", (16, 1024, 32, 4, 128)))
    latent = LatentAttention(128, 1536, 512, 128, 64, 128)
    amount = cell_work(Cell(0, "context_mla", (1, 2048, 128), dtype="bf16"))
    timed = ops.attention_core(
        latent, "prefill", one, 2048 * one, amount.flops * one, amount.num_bytes * one, 1, "bf16"
    )
    check(timed, best("context_mla", (1, 2048, 128)))
    spec = load_model("qwen3-30b-a3b")
    load_LRS = np.bincount(chosen_experts(4096, 8, 128, "uniform").ravel(), minlength=128).reshape(1, 1, 128)
    params_LRS = np.full(load_LRS.shape, 3.0 * 2048 * 768)
    for dtype in ("bf16", "fp8_block", "int4"):
        timed = ops.experts(load_LRS.astype(np.int32), params_LRS, spec.experts, 2048, dtype)
        check(timed, best("moe", (4096, 2048, 768, 8, 128, 1, 1), dtype, distribution="uniform"))


def test_a_run_rests_on_the_profile(made, tmp_path):
    out, *_ = made
    text = QUICKSTART.read_text().partition("[beside")[0]
    (tmp_path / "plain.toml").write_text(text)
    (tmp_path / "with_tables.toml").write_text(f"profile = {json.dumps(str(out))}\n{text}")
    plain, with_tables = (run(load(tmp_path / f"{name}.toml")[0], "estimate") for name in ("plain", "with_tables"))
    assert plain.provenance["measured_fraction"] == 0
    assert with_tables.provenance["measured_fraction"] > 0.2


def test_files_of_a_profile(made):
    out, _, _, results = made
    assert [path.name for path in results.written] == [
        "tables.parquet", "ceilings.json", "ceilings.txt", f"{MADE}.toml", "forward.csv",
    ]  # fmt: skip
    assert all(path.is_file() for path in results.written)
    assert (out / "ceilings.txt").read_text().rstrip().endswith("\n".join(results.ceilings.figures()))
    device = load_device(str(out / f"{MADE}.toml"))
    assert device.memory.bytes_per_s == pytest.approx(results.ceilings.copy_bytes_per_s, rel=1e-3)
    assert set(device.flops_per_s) == {"bf16", "fp8"} and device.launch_s == 3e-6
    assert "assumed" in (out / f"{MADE}.toml").read_text().split("power = ")[1].splitlines()[0]
    rows = json.loads((out / "ceilings.json").read_text())["rows"]
    assert {row["tile"] for row in rows if row["tile"]} <= {"a tile"}
    lines = (out / "forward.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS) and len(lines) == 2  # the other pass was not timed
    assert lines[1].startswith(f"{MADE},olmoe-1b-7b,4,decode,8,1,128,streamed,") and ",0.5," in lines[1]
    provenance = load_profile(out).tables[0].provenance
    assert provenance["driver"] == INFO.driver and provenance["gpu"] == INFO.name
    with pytest.raises(ValueError, match="no cell was timed"):
        write_results(out, cuda_cells(90, has_triton=True), Samples(), {}, FACTS, INFO)


def test_a_job_that_fails_is_named_and_the_others_go_on():
    def broken(_turn):
        raise RuntimeError("out of\nmemory")

    turns = []

    def later(turn):
        turns.append(turn)
        return lambda: broken(turn) if len(turns) > 2 else None

    jobs = [Job("good", lambda _turn: lambda: None), Job("bad", broken), Job("later", later)]
    samples = Samples()
    timing = time_rounds(jobs, samples, 5.0, max_rounds=4, survived=(RuntimeError,))
    assert timing.failed == {"bad": "RuntimeError: out of", "later": "RuntimeError: out of"}
    assert len(samples.laps["good"]) == 4 and len(samples.laps["later"]) == 1 and "bad" not in samples.laps
    with pytest.raises(RuntimeError):
        time_rounds(jobs[1:2], Samples(), 5.0)


def test_what_the_driver_says(tmp_path):
    def told(text):
        program = tmp_path / "smi"
        program.write_text(f"#!/bin/sh\ncase $1 in --id=GPU-7) echo '{text}';; *) exit 6;; esac\n")
        program.chmod(0o755)
        return str(program)

    assert driver_and_power("GPU-7", told("570.86.15, 650.00")) == ("570.86.15", 650.0)
    assert driver_and_power("GPU-7", told("570.86.15, [N/A]")) == ("570.86.15", None)
    assert driver_and_power("GPU-8", told("570.86.15, 650.00")) == ("not said", None)
    assert driver_and_power("GPU-7", str(tmp_path / "none")) == ("not said", None)


def test_getting_ready_is_done_once_and_is_no_part_of_a_round():
    seconds, done = [0.0], []

    def spend(s):
        seconds[0] += s

    jobs = [
        Job(key, lambda _turn: lambda: spend(1.0), rank=1, ready=lambda key=key: (done.append(key), spend(20.0)))
        for key in "ab"
    ]
    samples = Samples()
    timing = time_rounds(jobs, samples, 50.0, max_rounds=4, clock=lambda: Lap(seconds[0], seconds[0]))
    assert done == ["a", "b"] and timing.dropped == () and timing.rounds == 4
    assert all(laps == [Lap(1.0, 1.0)] * 4 for laps in samples.laps.values())


def bench(seconds=lambda call, _repeats: (call(), 0.5)[1]):
    from moesim.profile.cuda import Bench

    return Bench("cpu", seconds, lambda: None)


def test_the_fastest_tile_is_kept_and_taken_again(tmp_path):
    from moesim.profile.cuda import Tiles, _fastest

    def fails():
        raise RuntimeError("too many registers")

    calls = {"slow": lambda: 3.0, "broken": fails, "quick": lambda: 1.0}
    told = bench(lambda call, _repeats: call())
    assert _fastest("cell", calls, told, Tiles(tmp_path / "tiles.json"))() == 1.0
    again = Tiles(tmp_path / "tiles.json")
    assert again.words == {"cell": "quick"}
    assert _fastest("cell", {"slow": lambda: 9.0, "quick": lambda: 2.0}, bench(lambda *_: 1 / 0), again)() == 2.0
    with pytest.raises(RuntimeError, match=r"every candidate failed: a: .*registers; b: "):
        _fastest("other", {"a": fails, "b": fails}, told, again)
    (tmp_path / "tiles.json").write_text("{")
    with pytest.raises(ValueError, match="not tiles by cell"):
        Tiles(tmp_path / "tiles.json")


MOE = (5, 128, 128, 2, 4, 1, 1)
TINY = [
    *(Cell(1, "moe", MOE, dtype=d, facts=(("distribution", "uniform"), ("kernel", k)))
      for d, k in (("bf16", "triton"), ("bf16", "triton_decode"), ("fp8_block", "triton"), ("int4", "triton"))),
    Cell(1, "generation_attention", (2, 70, 4, 2, 32), dtype="bf16", facts=(("kernel", "triton"),)),
    Cell(1, "router", (5, 8, 2), facts=(("kernel", "triton"),)),
    Cell(1, "expert_gather", (5, 64, 2, 4), dtype="bf16", facts=(("kernel", "triton"),)),
    Cell(1, "expert_combine", (5, 64, 2, 4), dtype="bf16", facts=(("kernel", "triton"),)),
    Cell(1, "copy", (4096,), dtype="bf16", facts=(("kernel", "triton"),)),
]  # fmt: skip
LIBRARY = [
    replace(cell, facts=(*cell.facts[:-1], ("kernel", "torch")))
    for cell in TINY
    if cell.dtype != "int4" and cell.dtype != "fp8_block" and kernel_of(cell) != "triton_decode"
]


@pytest.mark.parametrize("cell", TINY, ids=lambda cell: cell.key)
@interpreted
def test_every_triton_kernel_is_called_right(cell):
    from moesim.profile.cuda_calls import Calls

    outputs = [call() for call in Calls("cpu").of(cell).values()]
    assert outputs
    for out in outputs:
        first = out[0] if isinstance(out, tuple) else out
        assert first.shape[0] > 0
        assert cell.op == "expert_gather" or torch.isfinite(first.float()).all()  # unused rows are left as they were
        if cell.op in ("moe", "generation_attention"):  # every candidate gives the same
            torch.testing.assert_close(out, outputs[0], rtol=0.05, atol=0.05 * float(outputs[0].abs().max()))


@interpreted
def test_mla_is_called_right():
    from moesim.profile.cuda_calls import Calls

    cell = Cell(1, "generation_mla", (1, 33, 16), dtype="bf16", facts=(("kernel", "triton"),))
    first, *_ = Calls("cpu").of(cell).values()
    assert first().shape == (1, 16, 512)


@pytest.mark.parametrize(
    "cell",
    [
        *LIBRARY,
        Cell(1, "gemm", (16, 32, 64), dtype="bf16", facts=(("kernel", "torch"),)),
        Cell(1, "gemm", (16, 32, 64), dtype="fp8", facts=(("kernel", "torch"),)),
        Cell(1, "generation_mla", (2, 70, 4), dtype="bf16", facts=(("kernel", "torch"),)),
        Cell(1, "context_attention", (2, 30, 4, 2, 32), dtype="bf16", facts=(("kernel", "torch"),)),
        Cell(1, "context_mla", (2, 30, 4), dtype="bf16", facts=(("kernel", "torch"),)),
        Cell(1, "copy_to_device_pageable", (1024,), dtype="bf16"),
        Cell(0, "launch", ()),
    ],
    ids=lambda cell: cell.key,
)
def test_every_library_path_is_timed(cell):
    from moesim.profile.cuda import Tiles, cuda_jobs

    (job,) = cuda_jobs([cell], bench(), Tiles(), 0)
    lap = job.prepare(0)()
    assert lap == Lap(0.5, 0.5) if cell.shape else lap.wall_s > 0


@pytest.mark.parametrize(
    "cell",
    [
        Cell(1, "gemm", (16, 32, 64), dtype="fp8", facts=(("kernel", "torch"),)),
        Cell(1, "generation_attention", (2, 70, 4, 2, 32), dtype="bf16", facts=(("kernel", "torch"),)),
        Cell(1, "generation_mla", (2, 70, 4), dtype="bf16", facts=(("kernel", "torch"),)),
        Cell(1, "context_mla", (2, 30, 4), dtype="bf16", facts=(("kernel", "torch"),)),
    ],
    ids=lambda cell: cell.key,
)
def test_the_librarys_paths_give_the_same(cell):
    from moesim.profile.cuda_calls import Calls

    torch.manual_seed(0)
    first, *others = [call().flatten().float() for call in Calls("cpu").of(cell).values()]
    assert others
    for other in others:
        torch.testing.assert_close(other, first, rtol=0.05, atol=0.02 * float(first.abs().max()))


def test_torchs_experts_are_the_layer():
    from moesim.profile.cuda_calls import torch_experts

    draw = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        torch.randn(size, generator=draw).to(torch.bfloat16) for size in ((9, 32), (5, 48, 32), (5, 32, 24))
    )
    ids, weights = torch.from_numpy(chosen_experts(9, 2, 5, "zipf_1.2")), torch.rand((9, 2), generator=draw)
    exact = torch.zeros(9, 32, dtype=torch.float64)
    for t in range(9):
        for k in range(2):
            gate, up = (gate_up[ids[t, k]].double() @ x[t].double()).chunk(2)
            exact[t] += weights[t, k].double() * (down[ids[t, k]].double() @ (torch.nn.functional.silu(gate) * up))
    out = torch_experts(x, gate_up, down, ids, weights)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=0.03 * float(exact.abs().max()))


def tiny_olmoe():
    transformers = pytest.importorskip("transformers", reason="forward passes need transformers: moesim[capture]")
    return transformers.OlmoeConfig(
        num_hidden_layers=3, hidden_size=32, intermediate_size=16, num_experts=4, num_experts_per_tok=2, vocab_size=50,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


@pytest.mark.parametrize(("tokens", "context"), [(7, 0), (1, 6)], ids=["prefill", "decode"])
def test_streamed_experts_give_the_same_logits(tokens, context):
    from moesim.profile.forward_runs import StreamedExperts, maker

    make = maker(tiny_olmoe(), "cpu", torch.float32, 0, "eager")
    runs = {mode: Forward("tiny", 3, 2, tokens, context, mode) for mode in ("resident", "streamed")}
    resident, streamed = (make(mode).prepared(run, 1)() for mode, run in runs.items())
    assert resident.shape == (2, 50) and torch.equal(resident, streamed)
    runner = make("resident")
    held = StreamedExperts(runner.model, "cpu")
    before = runner.prepared(runs["streamed"], 1)()
    held._host[1][0].zero_()  # what lies in host memory is what counts
    assert not torch.equal(runner.prepared(runs["streamed"], 1)(), before)
    weights = [layer.mlp.experts.gate_up_proj.data_ptr() for layer in runner.model.model.layers]
    assert weights[0] == weights[2] != weights[1]  # two buffers for three layers


def test_forward_passes_are_timed_and_models_are_made_once():
    from moesim.profile.forward_runs import forward_jobs, maker

    made, inner = [], maker(tiny_olmoe(), "cpu", torch.float32, 0, "eager")
    runs = [Forward("tiny", 3, 1, *size, mode) for mode in ("resident", "streamed") for size in ((5, 0), (1, 4))]
    jobs = forward_jobs(lambda mode: (made.append(mode), inner(mode))[1], runs, 0, rank=2)
    samples = Samples()
    time_rounds(jobs, samples, 20.0, max_rounds=1)
    assert made == ["resident", "streamed"] and set(samples.laps) == {run.key for run in runs}
    assert all(lap.wall_s > 0 for laps in samples.laps.values() for lap in laps)


def test_a_model_without_experts_in_every_layer_is_refused():
    from moesim.profile.forward_runs import StreamedExperts, build

    model = build(tiny_olmoe(), "cpu", torch.float32, 0, "eager")
    model.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"layer 1 has no mlp\.experts"):
        StreamedExperts(model, "cpu")


def small_grid(capability, has_triton):
    """A grid as a device would get, with one cell that cannot be timed."""
    assert (capability, has_triton) == (INFO.capability, INFO.has_triton)
    library = (("kernel", "torch"),)
    return [
        Cell(0, "launch", ()),
        *(Cell(1, "gemm", (m, 32, 64), dtype="bf16", facts=library) for m in (1, 16)),
        Cell(1, "copy", (4096,), dtype="bf16", facts=library),
        Cell(1, "no_such_operator", (1,), dtype="bf16"),
    ]


def profile_command(out, monkeypatch, *options, cells=small_grid):
    from moesim.profile import cuda, cuda_cells, cuda_device

    monkeypatch.setattr(cuda_device, "device_info", lambda: INFO)
    monkeypatch.setattr(cuda_cells, "cuda_cells", cells)
    monkeypatch.setattr(cuda, "event_bench", bench)
    return CliRunner().invoke(cli, ["profile", "run", "--device", "cuda", "-o", str(out), *options])


def test_the_command_writes_what_could_be_timed_and_names_what_could_not(tmp_path, monkeypatch):
    out = tmp_path / "small_gpu"
    told = profile_command(out, monkeypatch)
    assert told.exit_code == 0, told.output
    assert "failed: no_such_operator/bf16/1: ValueError: no_such_operator is no operator" in told.stderr
    assert [Path(line).name for line in told.stdout.split()] == [
        "tables.parquet", "ceilings.json", "ceilings.txt", "small_gpu.toml",
    ]  # fmt: skip
    tables, device = load_profile(out), load_device(str(out / "small_gpu.toml"))
    assert {table.device for table in tables.tables} == {device.name} == {"small_gpu"}
    assert np.unique(tables.find("gemm", "bf16").seconds_N) == [0.5]
    laps = (out / "samples.jsonl").read_text()
    assert profile_command(out, monkeypatch).exit_code == 0 and (out / "samples.jsonl").read_text() == laps  # all known
    told = profile_command(out, monkeypatch, "--seed", "1")
    assert isinstance(told.exception, ValueError) and "timings of another profile" in str(told.exception)


def test_without_a_matrix_product_there_are_tables_but_no_device_file(tmp_path, monkeypatch):
    def copies(*given):
        return [cell for cell in small_grid(*given) if cell.op == "copy"]

    told = profile_command(tmp_path / "gpu", monkeypatch, cells=copies)
    assert told.exit_code == 0 and "gpu.toml is not written: no copy, or no matrix product" in told.stderr
    assert sorted(path.name for path in (tmp_path / "gpu").iterdir()) == [
        "ceilings.json", "ceilings.txt", "samples.jsonl", "tables.parquet",
    ]  # fmt: skip


def test_options_of_the_other_device_are_refused(tmp_path):
    for options in (["--device", "cuda", "--model", "x"], ["--device", "cpu", "--forward"]):
        error = CliRunner().invoke(cli, ["profile", "run", "-o", str(tmp_path / "x"), *options]).exception
        assert isinstance(error, ValueError) and "goes with --device" in str(error)
