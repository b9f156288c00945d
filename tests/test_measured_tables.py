"""Measured tables: interpolation's laws, intervals, and what lies outside."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.calibrate.measured import preferred
from moesim.costs.measured import MeasuredTable, MeasuredTables
from moesim.costs.measured_experts import experts_format, experts_seconds
from moesim.costs.work import moe_work, work

AXES = ("m", "n", "k")
FLOOR, PEAK, BANDWIDTH = 3e-6, 800e12, 3e12


def roofline(points):
    flops, num_bytes = work("gemm", "bf16", dict(zip(AXES, points.T, strict=True)))
    return corner(flops, num_bytes)


def corner(flops, num_bytes):
    """The longest of floor, arithmetic and memory."""
    return np.maximum(FLOOR, np.maximum(flops / PEAK, num_bytes / BANDWIDTH))


def grid(*sides):
    return np.stack([side.ravel() for side in np.meshgrid(*sides, indexing="ij")], axis=1)


def gemm_table(noise=0.0, seed=0, keep=1.0):
    rng = np.random.default_rng(seed)
    points = grid(2.0 ** np.arange(14), 2.0 ** np.arange(7, 14), 2.0 ** np.arange(7, 14))
    points = points[rng.random(len(points)) < keep]
    seconds = roofline(points) * np.exp(noise * rng.standard_normal(len(points)))
    return MeasuredTable("gemm", "bf16", "gpu", AXES, points, seconds)


def ask(table, points):
    return table.seconds(dict(zip(table.axes, points.T, strict=True)))


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_exact_at_every_point_of_a_ragged_table(keep):
    table = gemm_table(noise=0.3, keep=keep)
    found = ask(table, table.points_ND)
    np.testing.assert_allclose(found.seconds, table.seconds_N, rtol=1e-12)
    assert found.inside.all()
    assert ((found.low <= found.seconds) & (found.seconds <= found.high)).all()


def test_a_roofline_is_recovered_between_its_points():
    """The constants come back, and any other point is predicted, as the ratio is 1 everywhere."""
    table = gemm_table()
    fitted = table.roofline
    assert fitted.floor_s == pytest.approx(FLOOR, rel=0.02)
    assert 1 / fitted.s_per_flop == pytest.approx(PEAK, rel=0.02)
    assert 1 / fitted.s_per_byte == pytest.approx(BANDWIDTH, rel=0.02)
    points = np.exp(np.random.default_rng(1).uniform(np.log([1, 128, 128]), np.log(8192), (500, 3)))
    found = ask(table, points)
    assert np.abs(found.seconds / roofline(points) - 1).max() < 0.02
    assert found.inside.all()


@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_time_scales_with_the_clock(factor):
    """A device that is slower throughout by a factor is predicted slower by it everywhere."""
    table = gemm_table(noise=0.2)
    slower = MeasuredTable("gemm", "bf16", "gpu", AXES, table.points_ND, table.seconds_N * factor)
    points = np.exp(np.random.default_rng(2).uniform(np.log([1, 64, 64]), np.log(30000), (300, 3)))
    one, other = ask(table, points), ask(slower, points)
    for here, there in zip(one[:3], other[:3], strict=True):
        np.testing.assert_allclose(there, here * factor, rtol=1e-6)


def test_order_of_rows_does_not_matter():
    table = gemm_table(noise=0.2, keep=0.5)
    mixed = np.random.default_rng(3).permutation(len(table.seconds_N))
    other = MeasuredTable("gemm", "bf16", "gpu", AXES, table.points_ND[mixed], table.seconds_N[mixed])
    points = np.exp(np.random.default_rng(4).uniform(np.log(64), np.log(9000), (300, 3)))
    for here, there in zip(ask(table, points), ask(other, points), strict=True):
        np.testing.assert_allclose(there, here)


def test_all_at_once_is_one_by_one():
    table = gemm_table(noise=0.2, keep=0.5)
    points = np.exp(np.random.default_rng(5).uniform(np.log(0.5), np.log(20000), (100, 3)))
    whole = ask(table, points)
    for row, point in enumerate(points):
        for here, there in zip(whole, ask(table, point[None]), strict=True):
            assert here[row] == pytest.approx(there[0], rel=1e-12)


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_interval_covers_what_was_left_out(noise):
    """With noise of any size about nine in ten points left out lie inside, and wider noise means wider intervals."""
    table = gemm_table(noise=noise, seed=6)
    out = np.isin(table.points_ND[:, 0], 2.0 ** np.arange(1, 13, 3))
    kept = MeasuredTable("gemm", "bf16", "gpu", AXES, table.points_ND[~out], table.seconds_N[~out])
    found = ask(kept, table.points_ND[out])
    covered = (found.low <= table.seconds_N[out]) & (table.seconds_N[out] <= found.high)
    assert 0.85 <= covered.mean() <= 0.97
    assert noise < np.median(np.log(found.high / found.seconds)) < 4 * noise


def test_outside_is_flagged_and_grows_with_work():
    table = gemm_table(noise=0.1)
    m = np.geomspace(8192, 1e9, 60)
    found = table.seconds({"m": m, "n": 4096, "k": 4096})
    assert found.inside.tolist() == [True] + [False] * 59
    assert np.isfinite(found.seconds).all()
    assert (np.diff(found.seconds) > 0).all()
    np.testing.assert_allclose(found.seconds[-1] / found.seconds[-2], m[-1] / m[-2], rtol=1e-3)
    assert (found.high / found.seconds)[1:].min() > 1
    tiny = table.seconds({"m": 1e-3, "n": 1e-3, "k": 1e-3})
    assert not tiny.inside.any()
    assert 0 < tiny.seconds[0] < 2 * table.seconds_N.min()


def test_a_branch_that_ends_early_makes_its_side_outside():
    """Long rows were measured at a = 1 only: between a = 1 and a = 2 they lie outside; the short ones inside."""
    points = np.array([[1, 1], [1, 2], [1, 4], [1, 8], [2, 1], [2, 2]], float)
    table = MeasuredTable("walk", "bf16", "x", ("a", "length"), points, points.prod(axis=1))
    found = table.seconds({"a": [1.5, 1.5, 1.0, 2.0], "length": [1.5, 6.0, 6.0, 8.0]})
    assert found.inside.tolist() == [True, False, True, False]
    np.testing.assert_allclose(found.seconds, [2.25, 9, 6, 16], rtol=0.1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=20, unique=True), st.data())
def test_mixture_stays_between_its_neighbours(points, data):
    """The ratio to the roofline never leaves the range of the table, inside or out."""
    seconds = data.draw(st.lists(st.floats(1e-6, 1e-2), min_size=len(points), max_size=len(points)))
    table = MeasuredTable("walk", "bf16", "x", ("a", "b"), np.array(points, float), np.array(seconds))
    query = np.array(data.draw(st.lists(st.tuples(st.floats(0.1, 20), st.floats(0.1, 20)), min_size=1, max_size=9)))
    ratio = table.seconds_N / table.roofline.seconds(*work("walk", "bf16", table.coordinates()))
    found = ask(table, query)
    base = table.roofline.seconds(*work("walk", "bf16", dict(zip(table.axes, query.T, strict=True))))
    assert (found.seconds / base >= ratio.min() * (1 - 1e-9)).all()
    assert (found.seconds / base <= ratio.max() * (1 + 1e-9)).all()
    assert ((found.low <= found.seconds) & (found.seconds <= found.high)).all()


def test_repetitions_widen_the_interval_at_a_point():
    points = np.array([[1.0], [2.0], [4.0]])
    table = MeasuredTable("copy", "bf16", "x", ("size",), points, np.ones(3), np.full(3, 0.9), np.full(3, 1.1))
    found = table.seconds({"size": [2.0]})
    assert found.low[0] < 0.9
    assert found.high[0] > 1.1


def moe_table(hidden=4096.0, inter=1024.0):
    axes = ("num_tokens", "hidden_size", "inter_size", "top_k", "num_experts", "tp", "ep")
    points = grid(2.0 ** np.arange(15), [hidden], [inter], [8.0], [64.0], [1.0], [1.0])
    flops, num_bytes = work("moe", "bf16", dict(zip(axes, points.T, strict=True)))
    seconds = corner(flops, num_bytes)
    return MeasuredTable("moe", "bf16", "gpu", axes, points, seconds, facts={"distribution": "balanced"})


def test_experts_by_their_own_loads():
    """A table of evenly loaded experts answers for uneven ones: cold experts' weights are not read."""
    load = np.zeros((1, 4, 16), np.int32)
    load[0, 0] = 32
    load[0, 1, :4] = 128
    load[0, 2, 0] = 8
    found = experts_seconds(MeasuredTables([moe_table()]), load, 4096, 1024, 8, 64, "bf16")
    flops, num_bytes = moe_work(load.sum(-1).astype(float), (load > 0).sum(-1).astype(float), 4096, 1024, "bf16")
    want = corner(flops, num_bytes)
    want[0, 3] = 0
    np.testing.assert_allclose(found.seconds, want, rtol=0.1)  # the table says little of a floor of 3 us
    assert found.inside.all()


def test_experts_from_grouped_products():
    points = grid(2.0 ** np.arange(5), 2.0 ** np.arange(11), [1024.0, 2048.0, 4096.0], [1024.0, 2048.0, 4096.0])
    axes = ("num_experts", *AXES)
    flops, num_bytes = work("grouped_gemm", "bf16", dict(zip(axes, points.T, strict=True)))
    seconds = corner(flops, num_bytes)
    tables = MeasuredTables([MeasuredTable("grouped_gemm", "bf16", "gpu", axes, points, seconds)])
    load = np.array([[[64, 64, 0, 0], [0, 0, 0, 0]]], np.int32)
    found = experts_seconds(tables, load, 4096, 1024, 8, 64, "bf16")
    both = sum(
        tables.seconds("grouped_gemm", "bf16", {"num_experts": 2, "m": 64, "n": n, "k": k}).seconds[0]
        for n, k in ((2048, 4096), (4096, 1024))
    )
    assert found.seconds[0].tolist() == [both, 0.0]


def test_what_a_table_refuses():
    ones = np.ones(2)
    for points, seconds, said in (
        (np.array([[1.0], [1.0]]), ones, "same coordinates"),
        (np.array([[1.0], [0.0]]), ones, "must be positive"),
        (np.array([[1.0], [2.0]]), np.array([1.0, np.nan]), "must be positive"),
        (np.ones((2, 2)), ones, "rows x axes"),
        (np.ones((0, 1)), np.ones(0), "at least 1 x 1"),
    ):
        with pytest.raises(ValueError, match=said):
            MeasuredTable("copy", "bf16", "x", ("size",), points, seconds)
    table = gemm_table()
    with pytest.raises(ValueError, match="coordinates must be m, n, k; given m, n"):
        table.seconds({"m": 1, "n": 1})
    with pytest.raises(ValueError, match="k must be positive; given 0"):
        table.seconds({"m": 1, "n": 1, "k": [1, 0]})
    tables = MeasuredTables([table])
    with pytest.raises(ValueError, match="no measured table of gemm in fp8; there are: gemm in bf16"):
        tables.seconds("gemm", "fp8", {"m": 1, "n": 1, "k": 1})
    assert ("gemm", "bf16") in tables
    assert ("gemm", "fp8") not in tables


def test_of_like_tables_the_own_backends_newest_is_preferred():
    def table(backend, version, op="gemm", dtype="bf16", **facts):
        told = {"backend": backend, "version": version, "kernel": f"{backend} {version}", **facts}
        return MeasuredTable(op, dtype, "x", ("m",), np.array([[1.0], [4.0]]), np.ones(2), facts=told)

    given = [
        table("vllm", "0.9.0"), table("vllm", "0.24.0"), table("sglang", "0.5.14"), table("trtllm", "1.3.0rc20"),
        table("sglang", "0.5.14", dtype="fp8"), table("trtllm", "1.3.0", dtype="fp8"), table("own", "1", dtype="int4"),
        table("vllm", "0.9.0", "moe", distribution="balanced"),
        table("trtllm", "1.3.0", "moe", distribution="balanced"),
        table("trtllm", "1.3.0", "moe", distribution="power_law_1.2"),
    ]  # fmt: skip
    kept = [
        (table.op, table.dtype, table.facts["kernel"], table.facts.get("distribution", ""))
        for table in preferred(MeasuredTables(given), "vllm").tables
    ]
    assert kept == [
        ("gemm", "bf16", "vllm 0.24.0", ""), ("gemm", "fp8", "trtllm 1.3.0", ""), ("gemm", "int4", "own 1", ""),
        ("moe", "bf16", "vllm 0.9.0", "balanced"), ("moe", "bf16", "trtllm 1.3.0", "power_law_1.2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tabled", "asked", "found"),
    [("fp8_block", "fp8_block", "fp8_block"), ("fp8_block", "mxfp4", None), ("w4a16_mxfp4", "mxfp4", "w4a16_mxfp4"),
     ("w4a8_mxfp4_mxfp8", "mxfp4", "w4a8_mxfp4_mxfp8"), ("w4a16_mxfp4", "int4", None)],
)  # fmt: skip
def test_experts_in_mxfp4_are_found_under_the_formats_of_their_activations(tabled, asked, found):
    table = MeasuredTable("moe", tabled, "x", ("num_tokens",), np.array([[1.0], [4.0]]), np.ones(2))
    assert experts_format(MeasuredTables([table]), asked) == found
