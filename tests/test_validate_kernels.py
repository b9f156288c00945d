"""Validation of measured tables: held-out rows of the real tables of one device stay as near as they were measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from moesim.cli import cli
from moesim.cli.validate.printing import print_validation
from moesim.validate.cases import Case, Validation, summary
from moesim.validate.kernels import AIMS, validate_kernels

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "kernels_aiconfigurator" / "data"


def put_systems(root, noise=0.0, systems=("h100_sxm", "h200_sxm")):
    """A table of products of each system, as aiconfigurator writes them: a sharp roofline with noise of measurement."""
    for index, system in enumerate(systems):
        rng = np.random.default_rng(index)
        m, n, k = (x.ravel() for x in np.meshgrid(2 ** np.arange(13), 2 ** np.arange(8, 14), 2 ** np.arange(8, 14)))
        seconds = np.maximum(4e-6, np.maximum(2 * m * n * k / 7e14, 2 * (n * k + m * k + m * n) / (2e12 * (index + 1))))
        columns = {"op_name": ["gemm"] * len(m), "device": ["gpu"] * len(m), "gemm_dtype": ["bfloat16"] * len(m)}
        latency = 1e3 * seconds * np.exp(noise * rng.standard_normal(len(m)))
        folder = root / system / "gemm" / "vllm" / "1"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({**columns, "m": m, "n": n, "k": k, "latency": latency}), folder / "gemm_perf.parquet")
    return root


def test_a_roofline_is_predicted_where_it_was_held_out(tmp_path):
    """No error to speak of in what is one, an error as large as the noise in what is noisy, and no more of it."""
    exact = validate_kernels(put_systems(tmp_path / "exact", systems=["h100_sxm"]))
    assert list(exact.groups()) == ["h100_sxm gemm"]
    assert summary(exact.cases)["p90_abs_error"] < 0.01
    # Of two neighbours and itself, each off by 5 %: sqrt(1.5) x 5 %, whose median is 0.6745 of it.
    noisy = summary(validate_kernels(put_systems(tmp_path / "noisy", 0.05, ["h100_sxm"])).cases)
    assert noisy["median_abs_error"] == pytest.approx(0.6745 * np.sqrt(1.5) * 0.05, rel=0.2)
    assert 0.85 < noisy["coverage_90"] < 0.97


def test_rows_held_out_are_not_seen(tmp_path):
    """A spike at a size that is held out, in half of its rows, is missed by just as much."""
    root = put_systems(tmp_path, systems=["h100_sxm"])
    path = next(root.rglob("*.parquet"))
    rows = pq.read_table(path)
    spiked = np.asarray(rows["m"]) == 2  # the second of m's values is the first to be held out
    latency = np.where(spiked, 10.0, 1.0) * np.asarray(rows["latency"])
    pq.write_table(rows.set_column(rows.column_names.index("latency"), "latency", pa.array(latency)), path)
    found = [case for case in validate_kernels(root).cases if "without every third m: m=2 " in case.case]
    assert found
    assert all(case.error == pytest.approx(-0.9, abs=0.02) and not case.is_covered for case in found)


def test_order_of_groups_and_rows_counted(tmp_path):
    found = validate_kernels(put_systems(tmp_path, 0.02))
    groups = list(found.groups())
    assert groups == ["h100_sxm gemm", "h200_sxm gemm", "h200_sxm from h100_sxm gemm"]
    assert found.facts["of them predicted"] == sum(len(found.groups()[name]) for name in groups[:2])
    assert validate_kernels(tmp_path, seed=0).cases == found.cases
    assert validate_kernels(tmp_path, seed=1).cases != found.cases
    with pytest.raises(ValueError, match=r"device must be one of a100_sxm, .*; given h300"):
        validate_kernels(tmp_path, ["h300"])


# --- what is printed


def made_cases(group, error, rows=20, **more):
    return [
        Case(f"{group}: [{row}]", 1e-3, 1e-3 * (1 + error), 0.5e-3, 2e-3, group=group, **more) for row in range(rows)
    ]


def printed(capsys, validation, **how):
    print_validation(validation, how.pop("as_json", False), **how)
    return capsys.readouterr().out


MADE = Validation(
    "kernels",
    (
        *made_cases("h100_sxm attention, other models, outside", 0.3, baseline=2e-3),
        *made_cases("h100_sxm gemm", 0.01),
        *made_cases("h200_sxm from h100_sxm collectives, outside", 0.2, rows=1),
        *made_cases("h200_sxm moe", 0.0, rows=2, fitted=True),
    ),
    {
        "held-out rows": 1050990,
        "peak_bytes_per_s": 1.2344e11,
        "run_to_run_spread": 0.0123456,
        "said": "a long line of words " * 12,
    },
    AIMS,
)


def test_a_validation_at_a_glance(capsys):
    lines = printed(capsys, MADE, all_cases=True).splitlines()
    assert max(map(len, lines)) <= 120
    text = "\n".join(lines)
    assert "held-out rows: 1,050,990" in text
    assert "peak bytes per s: 1.234e+11" in text and "run to run spread: 1.2%" in text
    assert (
        "aims: median error at most 4%, 90th error at most 12%, in 90 % interval 85% to 95%; ! misses its aim" in text
    )
    rows = {line[:44].strip(): line[44:].split() for line in lines if "  " in line}
    assert rows["h100_sxm attention, other models, outside"] == [
        "20", "!30.0%", "30.0%", "!30.0%", "+30.0%", "!100%", "100.0%", "100.0%", "0", "of", "3",
    ]  # fmt: skip
    assert rows["h100_sxm gemm"] == ["20", "1.0%", "1.0%", "1.0%", "+1.0%", "!100%", "-", "-", "2", "of", "3"]
    assert rows["h200_sxm moe"] == ["0", *["-"] * 8]
    assert rows["all"][0] == "41"
    at = next(index for index, line in enumerate(lines) if line.startswith(" h200_sxm"))
    assert lines[at - 1].strip() == ""  # devices stand apart
    assert sum("fitted" in line for line in lines) == 2
    assert any("h100_sxm gemm: [3]" in line and "+1.0%" in line for line in lines)  # no mark-up


def test_a_validation_without_aims(capsys):
    """As those of serving and of this machine are."""
    cases = (*made_cases("prefill, zipf", 0.1), *made_cases("decode, zipf", -0.2))
    lines = printed(capsys, Validation("this-machine", cases, {"cpu": "a", "cores": 2})).splitlines()
    assert lines[:2] == ["cpu: a", "cores: 2"]
    assert max(map(len, lines)) <= 120
    text = "\n".join(lines)
    assert "aims" not in text
    assert "!" not in text
    rows = [line.split() for line in lines if line.strip()]
    assert rows[-3] == ["prefill,", "zipf", "20", "10.0%", "10.0%", "10.0%", "+10.0%", "100%", "-", "-"]
    assert rows[-1][:3] == ["all", "40", "15.0%"]


def test_json_keeps_every_figure_and_what_was_missed(capsys):
    found = json.loads(printed(capsys, MADE, as_json=True))
    assert found["aims"] == {name: list(aim) for name, aim in AIMS.items()}
    outside = found["groups"]["h100_sxm attention, other models, outside"]
    assert outside["aims_missed"] == ["median_abs_error", "p90_abs_error", "coverage_90"]
    assert outside["p75_abs_error"] == pytest.approx(0.3)
    assert found["groups"]["h200_sxm moe"] == {"rows": 0, "aims_missed": []}
    assert len(found["table"]) == found["rows"] + 2 == 43


def test_the_command(tmp_path):
    root = str(put_systems(tmp_path, 0.02, ["h200_sxm"]))
    done = CliRunner().invoke(cli, ["validate", "kernels", root, "--device", "h200_sxm"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "h200_sxm gemm" in done.stdout
    assert "h200_sxm: 1 tables" in done.stderr


# --- real tables


P90_AT_MOST = {
    "attention": 0.15,
    "collectives": 0.14,
    "exchange": 0.06,
    "gemm": 0.12,
    "mla": 0.18,
    "moe": 0.15,
}
"""A fifth and more above what was measured with seed 0: 12.2, 11.4, 3.6, 9.3, 13.7 and 11.7 %; medians 1.2 to 2.9 %."""


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not beside the checkout")
def test_held_out_rows_of_one_device():
    """Seed 1: bounds were set by seed 0, and hold for other choices of rows.

    Intervals of exchanges are wider than they should be: 99 % of held-out rows are inside.
    """
    found = validate_kernels(DATA, ["h200_sxm"], seed=1)
    groups = {name: summary([case for case in found.cases if case.group == f"h200_sxm {name}"]) for name in P90_AT_MOST}
    for name, most in P90_AT_MOST.items():
        said = groups[name]
        assert said["rows"] >= 200, name
        assert said["median_abs_error"] < 0.04, name
        assert said["p90_abs_error"] < most, name
        assert abs(said["bias"]) < 0.015, name
        assert 0.82 <= said["coverage_90"] <= (1.0 if name == "exchange" else 0.97), name
        assert said["median_abs_error"] < 0.1 * said["baseline_median_abs_error"], name  # the roofline beside it
    assert found.facts["held-out rows"] > 1_000_000
