"""Predicting passes from tables of parts: laws on made-up tables, then a real small model on this machine."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from moesim.cli import cli
from moesim.files.hardware import load_device
from moesim.profile.machine import Peaks, device_toml, one_thread, peaks, rates
from moesim.profile.passes import ROUTINGS, Pass, counts_of, draw_passes, forced_ids
from moesim.profile.rounds import Lap, Samples
from moesim.profile.shapes import AXES, MIXTRAL, QWEN3, SHAPES, ModelShape, machine_cells, model_cells, work
from moesim.profile.sums import moe_part, parts_of
from moesim.profile.tables import tables_of
from moesim.validate.cases import summary
from moesim.validate.this_machine import half_width, predict, roofline_s

BATCH, CONTEXT, TOKENS = 24, 640, 512
CELLS = model_cells(MIXTRAL, BATCH, CONTEXT, TOKENS)
TINY = ModelShape("tiny", "qwen3_moe", 2, 64, 32, 8, 2, 4, 2, 16, 256)


def linear_seconds(cell):
    """A machine on which everything takes a constant and so much for each row, and experts one after another."""
    if cell.op == "moe_block":
        active, rows = cell.shape
        return 1e-4 + active * (1e-3 + 1e-5 * rows)
    return 1e-4 + 1e-6 * float(np.prod(cell.shape))


def tables(cells, seconds=linear_seconds):
    laps = {cell.key: [Lap(2 * seconds(cell), seconds(cell))] * 3 for cell in cells}
    return {table.op: table for table in tables_of(cells, Samples(laps=laps), "cpu_s")}


LINEAR = tables(CELLS)


def total_s(parts):
    return sum(part.seconds for part in parts.values())


def test_the_grid_has_every_row_count_to_16_and_no_cell_twice():
    for shape in SHAPES.values():
        cells = model_cells(shape, BATCH, CONTEXT, TOKENS)
        assert len({cell.key for cell in cells}) == len(cells)
        for active in (shape.top_k, shape.experts):
            rows = {cell.shape[1] for cell in cells if cell.op == "moe_block" and cell.shape[0] == active}
            assert set(range(1, 17)) <= rows
            assert max(rows) >= (TOKENS if active == shape.top_k else 64)
        assert all(len(cell.shape) == len(AXES[cell.op]) and cell.model == shape.name for cell in cells)
        assert {cell.rank for cell in cells} == {1, 2}
    assert {cell.rank for cell in model_cells(MIXTRAL, BATCH, CONTEXT, TOKENS, first_rank=3)} == {3, 4}


def test_the_core_of_the_grid_reaches_as_far_as_all_of_it():
    core = [cell for cell in CELLS if cell.rank == 1]
    table = tables(core)
    for run in draw_passes(CELLS, 20, 20, BATCH, CONTEXT, TOKENS, seed=1):
        ids = forced_ids(MIXTRAL, replace(run, routing="hot"), 0)
        parts_of(table, run, counts_of(ids, MIXTRAL.experts))


def test_sizes_of_the_models():
    assert MIXTRAL.num_params == pytest.approx(239e6, rel=0.01)
    assert QWEN3.expert_params == 3 * 768 * 256
    assert work(MIXTRAL, "moe_block", (2, 5))[0] == 2 * 2 * 5 * MIXTRAL.expert_params


@given(st.integers(0, 10_000))
def test_passes_are_off_the_points_and_inside_the_grid(seed):
    runs = draw_passes(CELLS, 6, 6, BATCH, CONTEXT, TOKENS, seed)
    lengths = {cell.shape[1] for cell in CELLS if cell.op == "attention_prefill"}
    contexts = {cell.shape[1] for cell in CELLS if cell.op == "attention_decode"}
    batches = {cell.shape[0] for cell in CELLS if cell.op == "frame_decode"}
    assert len({(run.batch, run.tokens, run.context) for run in runs}) == 12
    for run in runs:
        if run.phase == "prefill":
            assert run.tokens not in lengths and run.context == 0
        else:
            assert run.context not in contexts and (run.batch <= 8 or run.batch not in batches)
        parts_of(LINEAR, run, counts_of(forced_ids(MIXTRAL, replace(run, routing="zipf"), 0), MIXTRAL.experts))
    assert [run.routing for run in runs[:4]] == list(ROUTINGS)


@pytest.mark.parametrize("routing", ROUTINGS[1:])
@pytest.mark.parametrize("shape", [MIXTRAL, QWEN3])
def test_forced_routing_gives_each_token_distinct_experts(routing, shape):
    run = Pass(3, 50, 0, routing)
    ids = forced_ids(shape, run, 5)
    assert ids.shape == (shape.layers, 150, shape.top_k)
    assert ids.min() >= 0 and ids.max() < shape.experts
    assert all(len(set(token)) == shape.top_k for token in ids.reshape(-1, shape.top_k).tolist())
    counts = counts_of(ids, shape.experts)
    assert (counts.sum(axis=1) == 150 * shape.top_k).all()
    skew = counts.max(axis=1) / counts.mean(axis=1)
    if routing == "even":
        assert counts.max() - counts.min() <= 1
    else:
        assert (skew > 1.5).all()
    assert np.array_equal(ids, forced_ids(shape, run, 5))


def test_natural_routing_is_left_to_the_model():
    assert forced_ids(MIXTRAL, Pass(1, 9, 0, "natural"), 0) is None


@given(st.lists(st.integers(0, 64), min_size=8, max_size=8).filter(lambda rows: sum(r > 0 for r in rows) >= 2))
def test_experts_add_up(rows):
    rows = np.array([rows])
    active = rows[rows > 0]
    assert moe_part(LINEAR["moe_block"], rows).seconds == pytest.approx(1e-4 + np.sum(1e-3 + 1e-5 * active), rel=0.01)


def test_even_counts_give_the_cell_itself():
    rng = np.random.default_rng(0)
    drawn = {cell: rng.uniform(1, 2) for cell in CELLS}
    table = tables(CELLS, drawn.get)["moe_block"]
    for cell, seconds in drawn.items():
        if cell.op == "moe_block":
            active, rows = cell.shape
            layers = np.array([[rows] * active + [0] * (8 - active)] * 3)
            assert moe_part(table, layers).seconds == pytest.approx(3 * seconds)


@given(st.lists(st.integers(1, 300), min_size=8, max_size=8), st.integers(0, 7), st.integers(1, 100))
def test_more_rows_cost_more(rows, expert, more):
    before, after = np.array([rows]), np.array([rows])
    after[0, expert] += more
    assert moe_part(LINEAR["moe_block"], after).seconds > moe_part(LINEAR["moe_block"], before).seconds


def test_hot_routing_costs_less_where_weights_are_what_is_read():
    def seconds(routing):
        run = Pass(6, 1, 300, routing)
        return parts_of(LINEAR, run, counts_of(forced_ids(MIXTRAL, run, 0), MIXTRAL.experts))["moe_block"].seconds

    assert seconds("hot") < seconds("zipf") < seconds("even")


def test_a_pass_that_the_tables_do_not_reach_is_refused():
    counts = np.full((8, 8), 4)
    with pytest.raises(ValueError, match="outside"):
        parts_of(LINEAR, Pass(2, 1, 10_000, "even"), counts)
    with pytest.raises(ValueError, match="outside"):
        parts_of(LINEAR, Pass(1, 100, 0, "even"), counts * 1000)
    with pytest.raises(ValueError, match="no frame_prefill"):
        lacking = {op: table for op, table in LINEAR.items() if op != "frame_prefill"}
        parts_of(lacking, Pass(1, 100, 0, "even"), counts)


def test_tables_say_the_spread_of_the_median_of_their_rounds():
    cell = CELLS[0]
    laps = [Lap(s, s) for s in np.linspace(0.8, 1.2, 25)]
    [table] = tables_of([cell], Samples(laps={cell.key: laps}), "cpu_s")
    p20, p80 = np.percentile([lap.cpu_s for lap in laps], (20, 80))
    assert table.seconds_N[0] == pytest.approx(1.0)
    assert table.low_N[0] == pytest.approx(p20**0.25066) and table.high_N[0] == pytest.approx(p80**0.25066)


class Timed:
    """Samples of the linear machine: each whole takes the sum of its parts, times `slower` to each key."""

    def __init__(self, cells, wholes, slower=lambda whole: 1.0):
        medians = {cell.key: linear_seconds(cell) for cell in cells if cell.model}
        medians |= {cell.key: 1e-3 for cell in cells if not cell.model}
        for whole in wholes:
            medians[whole.key] = slower(whole) * total_s(parts_of(LINEAR, whole.run, whole.counts_LE))
        self.samples = Samples(laps={key: [Lap(2 * s, s)] * 3 for key, s in medians.items()})


def wholes_of(seed=0):
    pytest.importorskip("torch", reason="closure passes live beside what needs torch")
    from moesim.profile.cpu import Whole, closure_passes

    found = []
    for closure, runs in (
        (True, closure_passes(CELLS)),
        (False, draw_passes(CELLS, 4, 4, BATCH, CONTEXT, TOKENS, seed)),
    ):
        for run in runs:
            ids = forced_ids(MIXTRAL, replace(run, routing="even") if run.routing == "natural" else run, seed)
            counts = counts_of(ids, MIXTRAL.experts)
            found.append(Whole(f"{run.key} {closure}", MIXTRAL, run, counts, closure))
    return found


def test_prediction_fits_nothing_to_the_passes():
    cells, wholes = [*machine_cells(), *CELLS], wholes_of()
    plain = predict(cells, wholes, Timed(cells, wholes).samples, "cpu_s")
    assert len(plain) == sum(not whole.is_closure for whole in wholes)
    assert not any(case.fitted for case in plain)
    assert all(case.error == pytest.approx(0) and case.low <= case.predicted <= case.high for case in plain)
    slow = predict(cells, wholes, Timed(cells, wholes, lambda w: 1.0 if w.is_closure else 7.0).samples, "cpu_s")
    assert [(c.predicted, c.low, c.high) for c in slow] == [(c.predicted, c.low, c.high) for c in plain]
    assert summary(slow)["median_abs_error"] == pytest.approx(6 / 7)
    wall = predict(cells, wholes, Timed(cells, wholes).samples, "wall_s")
    assert [case.predicted for case in wall] == pytest.approx([2 * case.predicted for case in plain])


def test_closure_passes_widen_the_interval_and_move_nothing():
    cells, wholes = [*machine_cells(), *CELLS], wholes_of()
    plain = predict(cells, wholes, Timed(cells, wholes).samples, "cpu_s")
    wide = predict(cells, wholes, Timed(cells, wholes, lambda w: 1.1 if w.is_closure else 1.0).samples, "cpu_s")
    assert [case.predicted for case in wide] == [case.predicted for case in plain]
    assert all(w.low < p.low and w.high > p.high for w, p in zip(wide, plain, strict=True))
    parts = parts_of(LINEAR, wholes[-1].run, wholes[-1].counts_LE)
    wider = half_width(parts, [0.03, -0.04])
    assert wider == pytest.approx(np.hypot(1.645 * np.sqrt(0.00125), half_width(parts, [])))


def test_the_table_reaches_less_where_cells_were_dropped():
    cells, wholes = [*machine_cells(), *CELLS], wholes_of()
    samples = Timed(cells, wholes).samples
    for key in [key for key in samples.laps if "attention_decode" in key]:
        del samples.laps[key]
    found = predict(cells, wholes, samples, "cpu_s")
    assert found and all(case.group.startswith("prefill") for case in found)


def test_the_roofline_is_the_slower_of_arithmetic_and_reading():
    run, counts = Pass(4, 1, 100, "even"), np.ones((8, 8), int)
    reads = roofline_s(MIXTRAL, run, counts, Peaks(1e30, 1e10))
    computes = roofline_s(MIXTRAL, run, counts, Peaks(1e10, 1e30))
    assert reads > 8 * 8 * MIXTRAL.expert_params * 4 / 1e10
    assert computes == pytest.approx(
        (64 * 2 * MIXTRAL.expert_params + 8 * work(MIXTRAL, "attention_decode", (4, 100))[0] + 2 * 4 * 8192 * 1024)
        / 1e10
    )
    assert max(reads, computes) <= roofline_s(MIXTRAL, run, counts, Peaks(1e10, 1e10)) <= reads + computes


def test_the_device_file_is_one_that_moesim_reads(tmp_path):
    cells = {cell: 1e-3 * (1 + i % 3) for i, cell in enumerate([*machine_cells(), *CELLS])}
    path = tmp_path / "here.toml"
    path.write_text(device_toml(cells, {"cpu": 'A "CPU"', "torch": "2"}))
    device = load_device(str(path))
    top = peaks(rates(cells))
    assert device.flops_per_s["fp32"] == pytest.approx(top.flops_per_s, rel=1e-3)
    assert device.memory.bytes_per_s == pytest.approx(top.bytes_per_s, rel=1e-3)
    assert device.efficiency["gemm"].source == "measured" and device.sources["flops"].startswith("measured: ")
    with pytest.raises(ValueError, match="larger budget"):
        peaks(rates({}))


def test_one_thread_is_asked_for_in_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    one_thread()
    import os

    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"


def test_without_torch_the_commands_say_what_to_install(monkeypatch, tmp_path):
    for module in ("moesim.profile.parts", "moesim.profile.cpu"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    for command in (["validate", "this-machine"], ["profile", "run", "-o", str(tmp_path / "p")]):
        error = CliRunner().invoke(cli, command).exception
        assert isinstance(error, ValueError) and "pip install 'moesim[capture]'" in str(error)
