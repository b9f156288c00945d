"""Validation of measured tables: held-out rows of the real tables of one device stay as near as they were measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.validate.cases import summary
from moesim.validate.kernels import validate_kernels

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "kernels_aiconfigurator" / "data"

P90_AT_MOST = {
    "attention": 0.15,
    "collectives": 0.14,
    "exchange": 0.10,
    "gemm": 0.12,
    "mla": 0.19,
    "moe": 0.15,
}
"""A quarter above what was measured with seed 0: 12.6, 11.4, 6.7, 8.4, 15.2 and 12.0 %. Medians were 1.7 to 2.9 %."""


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not beside the checkout")
def test_held_out_rows_of_one_device():
    """Seed 1: bounds were set by seed 0, and hold for other choices of rows."""
    found = validate_kernels(DATA, ["h200_sxm"], seed=1)
    groups = {name: summary([case for case in found.cases if case.group == f"h200_sxm {name}"]) for name in P90_AT_MOST}
    for name, most in P90_AT_MOST.items():
        said = groups[name]
        assert said["rows"] >= 250, name
        assert said["median_abs_error"] < 0.04, name
        assert said["p90_abs_error"] < most, name
        assert abs(said["bias"]) < 0.015, name
        assert 0.82 <= said["coverage_90"] <= 0.99, name
        assert said["median_abs_error"] < 0.1 * said["baseline_median_abs_error"], name  # the roofline beside it
    assert found.facts["held-out rows"] > 1_000_000
