"""Transfers: recovery, blindness to what is held out, DeepEP's rows, and the real tables last."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from moesim.calibrate.transfers import fit_transfer
from moesim.cli import cli
from moesim.network.transfer import Transfer
from moesim.validate.cases import summary
from moesim.validate.network import AIMS, validate_network

DATA = Path(__file__).parents[2] / "shared" / "data"
SIZES = 2.0 ** np.arange(8, 30)
MADE = Transfer(8e-6, 3e11, 3.0, 2e6)


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize(
    "made", [MADE, Transfer(2e-6, 1e11, 0.5, 1e5), Transfer(3e-5, 5e10, 5.0, 5e6), Transfer(5e-6, 2e11, 2.0, 2e4)]
)
def test_a_made_transfer_is_found_between_its_sizes(made, noise):
    seconds = made.seconds(SIZES) * np.exp(noise * np.random.default_rng(0).standard_normal(len(SIZES)))
    found = fit_transfer(SIZES[::2], seconds[::2])
    between = np.abs(found.seconds(SIZES[1::2]) / made.seconds(SIZES[1::2]) - 1)
    assert np.median(between) < 0.03 + 2 * noise and between.max() < 0.1 + 4 * noise  # beliefs pull a little


def test_a_transfer_grows_with_its_size_and_needs_three():
    assert (np.diff(MADE.seconds(SIZES)) > 0).all()
    with pytest.raises(ValueError, match="3 sizes or more, given 2"):
        fit_transfer(SIZES[:2], MADE.seconds(SIZES[:2]))


def nccl_folder(tmp_path, seconds):
    folder = tmp_path / "h100_sxm" / "comm" / "nccl" / "2.0"
    folder.mkdir(parents=True)
    same = {"op_name": "all_reduce", "kernel_source": "NCCL", "device": "x", "nccl_dtype": "half", "num_gpus": 8}
    rows = {name: [value] * len(SIZES) for name, value in same.items()}
    rows |= {"message_size": (SIZES / 2).astype(int), "latency": seconds * 1e3}
    pq.write_table(pa.table(rows), folder / "nccl_perf.parquet")
    return tmp_path


def test_what_is_held_out_moves_no_prediction(tmp_path):
    wire = SIZES * 2 * 7 / 8
    plain = validate_network(nccl_folder(tmp_path / "a", MADE.seconds(wire)))
    assert len(plain.cases) == len(SIZES) // 2 and summary(plain.cases)["p90_abs_error"] < 0.05
    assert not any(case.fitted for case in plain.cases) and {case.group for case in plain.cases} == {
        "h100_sxm NCCL all_reduce"
    }
    seconds = MADE.seconds(wire)
    seconds[1::2] *= 3
    other = validate_network(nccl_folder(tmp_path / "b", seconds))
    assert [case.predicted for case in other.cases] == [case.predicted for case in plain.cases]
    assert summary(other.cases)["median_abs_error"] == pytest.approx(2 / 3, rel=0.05)
    assert all(case.baseline < case.predicted for case in plain.cases)  # a datasheet is never slower


def deepep_csv(path, text=""):
    rows = "ep,tokens_per_rank,hidden,topk,dispatch_us,combine_us\n8,128,7168,8,80,120\n32,128,7168,8,160,280\n"
    path.write_text(rows + (text or "128,128,7168,8,200,350\n"))
    return path


def test_published_rows_are_fitted_and_others_predicted(tmp_path):
    folder = nccl_folder(tmp_path / "a", MADE.seconds(SIZES))
    found = validate_network(folder, published=deepep_csv(tmp_path / "d.csv"))
    rows = [case for case in found.cases if case.group == "DeepEP published, fitted"]
    assert len(rows) == 6 and all(case.fitted and abs(case.error) < 0.05 for case in rows)
    assert all(case.low <= case.predicted <= case.high for case in rows)
    told = found.facts["DeepEP low latency dispatch, predicted"]
    numbers = [float(part.split()[1]) for part in told.split(", ")]
    assert [part.split()[0] for part in told.split(", ")] == ["EP16", "EP64", "EP256"]
    assert 80 < numbers[0] < 160 < numbers[1] < 200 < numbers[2] < 215  # between the rows, and beyond the last
    with pytest.raises(ValueError, match="a row inside one node and two beyond"):
        validate_network(folder, published=deepep_csv(tmp_path / "e.csv", "16,128,7168,8,80,120\n".replace("16", "8")))
    with pytest.raises(ValueError, match=r"f\.csv: needs numbers under ep"):
        validate_network(folder, published=deepep_csv(tmp_path / "f.csv", "128,128,7168,8,fast,350\n"))


def test_the_command_prints_and_skips(tmp_path):
    folder = str(nccl_folder(tmp_path / "a", MADE.seconds(SIZES)))
    told = CliRunner().invoke(cli, ["validate", "network", folder, "--json"], catch_exceptions=False)
    shape = json.loads(told.stdout)
    assert shape["name"] == "network" and shape["rows"] == len(shape["table"]) == 11
    table = CliRunner().invoke(cli, ["validate", "network", folder, "--all"], catch_exceptions=False).stdout
    assert "h100_sxm NCCL all_reduce" in table and "num_gpus=8" in table
    nowhere = CliRunner().invoke(cli, ["validate", "network", str(tmp_path / "no")], catch_exceptions=False)
    assert nowhere.exit_code == 0 and nowhere.stdout.startswith("skipped: ")


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not beside the checkout")
def test_real_collectives_are_within_the_aim():
    published = DATA / "published_numbers" / "deepep_v1_low_latency.csv"
    found = validate_network(DATA / "kernels_aiconfigurator", published=published)
    for group in found.groups():
        mine = [case for case in found.cases if case.group == group]
        if not mine[0].fitted:
            assert summary(mine)["median_abs_error"] <= AIMS["median_abs_error"][1], group
        else:
            assert all(abs(case.error) <= 0.05 for case in mine)
    assert 0.85 <= summary(found.cases)["coverage_90"] <= 0.95
