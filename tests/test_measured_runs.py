"""Runs on measured tables: what they say replaces rooflines, counts as measured, and narrows the intervals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim import load, run
from moesim.costs.measured import MeasuredTable, MeasuredTables
from moesim.costs.operators import Operators, attention_coordinates
from moesim.costs.work import work
from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.profiles.tables import write_tables
from moesim.mixers import Attention, LatentAttention, Mamba

QUICKSTART = Path(__file__).parents[1] / "studies" / "quickstart.toml"
SAID = {"source": "made up", "licence": "none", "driver": "none", "library_versions": "none", "date": "today"}


def made_table(op: str, sides: dict[str, tuple[float, ...]], slower: float = 1.0) -> MeasuredTable:
    """A table on a grid, 2 microseconds above a roofline of an H100, with some noise of measurement."""
    grid = np.stack(np.meshgrid(*sides.values(), indexing="ij"), axis=-1).reshape(-1, len(sides)).astype(float)
    flops, num_bytes = work(op, "bf16", dict(zip(sides, grid.T, strict=True)))
    noise = np.random.default_rng(0).normal(1, 0.01, len(grid))
    seconds = (2e-6 + np.maximum(flops / 700e12, num_bytes / 2.7e12)) * noise * slower
    return MeasuredTable(
        op, "bf16", "h100-sxm-80gb", tuple(sides), grid, seconds, 0.99 * seconds, 1.01 * seconds, {}, SAID
    )


def made_tables(slower: float = 1.0) -> list[MeasuredTable]:
    powers = tuple(2.0**i for i in range(15))
    widths = tuple(2.0**i for i in range(6, 17))
    return [
        made_table("gemm", {"m": powers, "n": widths, "k": widths}, slower),
        made_table("grouped_gemm", {"num_experts": (1.0, 4.0, 8.0, 64.0), "m": powers, "n": (1024.0, 2048.0, 4096.0),
                                    "k": (1024.0, 2048.0, 4096.0)}, slower),
        made_table("generation_attention", {"batch_size": powers[:10], "num_heads": (2.0, 16.0),
                                            "num_kv_heads": (2.0, 16.0), "head_dim": (64.0, 128.0),
                                            "kv_len": powers}, slower),
        made_table("context_attention", {"batch_size": powers[:10], "num_heads": (2.0, 16.0),
                                         "num_kv_heads": (2.0, 16.0), "head_dim": (64.0, 128.0),
                                         "seq_len": powers}, slower),
    ]  # fmt: skip


def relative_width(result, metric="tpot_s"):
    low, high = result.intervals[metric]
    return (high - low) / result.metrics[metric]


@pytest.mark.parametrize("engine", ["simulate", "estimate"])
def test_an_interval_widens_and_nothing_is_measured_when_the_tables_are_taken_away(engine):
    plain = load(QUICKSTART)[0]
    with_all = run(replace(plain, tables=MeasuredTables(made_tables())), engine)
    without = run(plain, engine)
    assert without.provenance["measured_fraction"] == 0
    assert with_all.provenance["measured_fraction"] > 0.5
    assert relative_width(with_all) < 0.75 * relative_width(without)  # launches and links are as unsure as before
    for kept in (1, 2):  # each table of decoding taken away adds doubt, and takes away what is measured
        some = run(replace(plain, tables=MeasuredTables(made_tables()[:kept])), engine)
        assert some.provenance["measured_fraction"] < with_all.provenance["measured_fraction"]
        assert relative_width(some) > relative_width(with_all)
    for result in (with_all, without):
        assert sum(result.provenance.values()) == pytest.approx(1)


def test_a_slower_table_is_a_slower_run():
    plain = load(QUICKSTART)[0]
    one, two = (
        run(replace(plain, tables=MeasuredTables(made_tables(slower))), "estimate").breakdown_s["decode"]
        for slower in (1.0, 2.0)
    )
    assert two["experts"] == pytest.approx(2 * one["experts"], rel=0.01)
    launches = 4 * 2e-6 * 16
    assert one["attention"] - launches < two["attention"] <= 2 * one["attention"]


def test_a_scenario_names_its_profile(tmp_path):
    write_tables(made_tables(), tmp_path / "h100.parquet")
    text = QUICKSTART.read_text()
    assert 'hardware = "' in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace('hardware = "', 'profile = "h100.parquet"\nhardware = "', 1))
    scenario = load(path)[0]
    assert scenario.tables.find("gemm", "bf16") is not None
    assert run(scenario, "estimate").provenance["measured_fraction"] > 0.5
    path.write_text(text.replace('hardware = "', 'profile = "nowhere.parquet"\nhardware = "', 1))
    with pytest.raises(ValueError, match=r"profile: .*nowhere\.parquet: no such file"):
        load(path)
    (tmp_path / "empty").mkdir()
    path.write_text(text.replace('hardware = "', 'profile = "empty"\nhardware = "', 1))
    with pytest.raises(ValueError, match="file in it; make a profile"):
        load(path)


def test_offloaded_experts_are_measured_too():
    offloaded = next(scenario for scenario in load(QUICKSTART) if scenario.is_offloaded)
    plain = run(offloaded, "estimate")
    measured = run(replace(offloaded, tables=MeasuredTables(made_tables())), "estimate")
    assert plain.provenance["measured_fraction"] == 0 < measured.provenance["measured_fraction"]


def test_tables_of_another_device_are_warned_of():
    base, _, offloaded = load(QUICKSTART)
    tables = MeasuredTables([replace(table, device="h100_sxm") for table in made_tables()])
    assert not any("profile" in said for said in run(replace(base, tables=tables), "estimate").warnings)
    told = run(replace(offloaded, tables=tables), "estimate").warnings
    assert any("measured on h100_sxm, the machine has rtx-4090" in said for said in told)


def test_outside_of_what_was_measured_is_fitted_not_measured():
    device = load_cluster("hgx-h100").device
    table = made_table("gemm", {"m": (1.0, 2.0, 4.0, 8.0), "n": (256.0, 512.0), "k": (256.0, 512.0)})
    ops = Operators(device, "value", MeasuredTables([table]))
    inside, outside = (ops.matmuls([(512, 512)], np.array([rows]), "bf16", 2.0) for rows in (3.0, 4096.0))
    assert inside.shares_X.tolist() == [1, 0, 0, 0]
    assert outside.shares_X.tolist() == [0, 1, 0, 0]
    assert ops.matmuls([(512, 512)], np.array([0.0]), "bf16", 2.0).seconds.tolist() == [0.0]
    ends = [Operators(device, b, MeasuredTables([table])).matmuls([(512, 512)], np.array([3.0]), "bf16", 2.0).seconds
            for b in ("high", "value", "low")]  # fmt: skip
    assert ends[0] < ends[1] < ends[2]


def test_coordinates_of_attention():
    two, hundred = np.array([2.0]), np.array([100.0])
    op, where = attention_coordinates(Attention(32, 4, 128), "decode", two, hundred, 8)
    assert op == "generation_attention"
    assert {name: float(np.squeeze(value)) for name, value in where.items()} == {
        "batch_size": 2, "kv_len": 50, "num_heads": 4, "num_kv_heads": 1, "head_dim": 128,
    }  # fmt: skip
    op, where = attention_coordinates(LatentAttention(128, 1536, 512, 128, 64, 128), "prefill", two, hundred, 1)
    assert op == "context_mla" and where["num_heads"] == 128
    assert attention_coordinates(Mamba(16, 4, 2, 8), "decode", two, hundred, 1) is None


def test_models_that_no_table_fits_fall_back_to_rooflines():
    """Formats without a table, and experts of unequal widths."""
    spec, device = load_model("deepseek-v3"), load_cluster("hgx-h100").device
    ffn, load_LRS = spec.experts, np.full((1, 1, 4), 3, np.int32)
    params_LRS = np.full((1, 1, 4), 3.0 * 7168 * 2048)
    measured = Operators(device, "value", MeasuredTables(made_tables()))
    assert measured.experts(load_LRS, params_LRS, ffn, 7168, "fp8_block").shares_X[0] == 0
    assert measured.experts(load_LRS, params_LRS, ffn, 7168, "bf16").rests_X[:2].sum() > 0
    uneven = replace(ffn, expert_widths=(1024, *ffn.expert_widths[1:]))
    plain = Operators(device).experts(load_LRS, params_LRS, uneven, 7168, "bf16")
    assert measured.experts(load_LRS, params_LRS, uneven, 7168, "bf16").seconds == plain.seconds
