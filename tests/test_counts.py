"""Count traces: exact loads, files that say what is wrong with them, and results that say where routing is from."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim import load, run
from moesim.cli import cli
from moesim.files.counts import METADATA_KEY, is_count_file, read_counts, write_counts
from moesim.files.scenarios import load_trace
from moesim.files.trace_rules import trace_mistakes
from moesim.routing.counts import CountTrace, scaled
from moesim.routing.load import counts_LE, expert_load_LE


def made_counts(windows=2, layers=(0, 7, 15), experts=16, top_k=4, tokens=300, seed=0) -> CountTrace:
    """Counts of tokens that chose `top_k` distinct experts, some experts far more often."""
    rng = np.random.default_rng(seed)
    score = rng.gumbel(size=(windows, tokens, len(layers), experts)) + np.linspace(0, 3, experts)
    ids = np.argsort(-score, axis=3)[..., :top_k]
    counts = np.stack([counts_LE(window.astype(np.uint8), experts) for window in ids])
    return CountTrace("made", "made up", top_k, counts, layers, {"source": "a test"})


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)),
    data=st.data(),
    num_tokens=st.one_of(st.none(), st.integers(1, 300)),
)
def test_loads_are_the_scaled_counts_and_experts_distinct(shape, data, num_tokens):
    top_k = data.draw(st.integers(1, shape[2]))
    size = shape[0] * shape[1] * shape[2]
    counts = np.array(data.draw(st.lists(st.integers(0, 400), min_size=size, max_size=size)))
    counts = counts.reshape(shape)
    counts[..., 0] += 1
    # Cap shares at 1/K, as a router with distinct experts does: lift the rest until the largest fits.
    while (over := counts.max(axis=2, keepdims=True) * top_k > counts.sum(axis=2, keepdims=True)).any():
        counts = counts + (over & (counts < counts.max(axis=2, keepdims=True)))
    source = CountTrace("made", "made up", top_k, counts.astype(np.int64), tuple(range(shape[1])))
    trace = source.to_routing(num_tokens, seed=1)
    assert trace_mistakes(trace) == []  # distinct experts among the rules
    own = [-(-int(window.sum(axis=1).max()) // top_k) for window in counts]
    start = 0
    for window, own_tokens in zip(counts, own, strict=True):
        T = num_tokens or own_tokens
        load_LE = counts_LE(trace.expert_ids_TLK[start : start + T], shape[2])
        for load_E, count_E in zip(load_LE, window, strict=True):
            share_E = [count * T * top_k / count_E.sum() for count in count_E.tolist()]
            assert load_E.sum() == T * top_k
            assert all(np.floor(s) <= n <= np.ceil(s) for n, s in zip(load_E, share_E, strict=True))
        np.testing.assert_array_equal(load_LE, scaled(window, T * top_k))
        start += T
    assert start == trace.num_tokens


def test_scaled_by_hand():
    # 10 seats of 47, 16, 37: quotas 4.7, 1.6, 3.7 -> 4, 1, 3 and the two left go to 0.7 and 0.7.
    assert scaled(np.array([[47, 16, 37]]), 10).tolist() == [[5, 1, 4]]
    assert scaled(np.array([[1, 1, 1]]), 4).tolist() == [[2, 1, 1]]


def test_a_source_small_enough_keeps_its_very_counts():
    source = made_counts(windows=1)
    trace = source.to_routing()
    assert trace.num_tokens == 300 and trace.origin == "counts" and trace.layers == (0, 7, 15)
    np.testing.assert_array_equal(expert_load_LE(trace), source.counts_WLE[0])
    lengths = np.bincount(trace.request_T)
    assert lengths.tolist() == [128, 128, 44]
    assert np.bincount(trace.request_T[trace.is_decode_T]).tolist() == [64, 64, 22]
    again, other = source.to_routing(), source.to_routing(seed=1)
    np.testing.assert_array_equal(trace.expert_ids_TLK, again.expert_ids_TLK)
    assert (trace.expert_ids_TLK != other.expert_ids_TLK).any()


def test_size_is_bounded_whatever_was_counted():
    big = replace(made_counts(), counts_WLE=made_counts().counts_WLE * 1_000_000)
    assert big.to_routing().num_tokens == 32_768
    with pytest.raises(ValueError, match="num_tokens must be from 1 to 1048576"):
        big.to_routing(0)


def test_a_share_above_one_kth_says_which_k_would_do():
    counts = np.array([[[5, 3, 2, 2]]])
    with pytest.raises(ValueError, match=r"layer 3: expert 0 has 5 of 12 counts, more than 1/3.*top_k of at most 2"):
        CountTrace("made", "made up", 3, counts, (3,)).to_routing()
    assert CountTrace("made", "made up", 2, counts, (3,)).to_routing().num_tokens == 6


def test_layers_are_independent_and_every_pair_of_experts_meets_alike():
    trace = CountTrace("even", "made up", 2, np.full((1, 2, 8), 5000), (0, 1)).to_routing()
    low, high = np.sort(trace.expert_ids_TLK[:, 0].astype(int), axis=1).T
    pairs = np.bincount(low * 8 + high)
    pairs = pairs[pairs > 0]
    assert len(pairs) == 28
    expected = 20_000 / 28
    assert ((pairs - expected) ** 2 / expected).sum() < 55.5  # chi-squared, 27 degrees of freedom, p = 0.001
    same = (trace.expert_ids_TLK[:, 0, 0] == trace.expert_ids_TLK[:, 1, 0]).mean()
    assert same == pytest.approx(1 / 8, abs=0.02)


def test_what_is_written_is_read(tmp_path):
    source, path = made_counts(), tmp_path / "c.parquet"
    write_counts(source, path)
    back = read_counts(path)
    assert is_count_file(path) and [item.name for item in tmp_path.iterdir()] == ["c.parquet"]
    for field in ("name", "model", "top_k", "layers", "provenance"):
        assert getattr(back, field) == getattr(source, field)
    np.testing.assert_array_equal(back.counts_WLE, source.counts_WLE)
    routing = load_trace(str(path))
    np.testing.assert_array_equal(routing.expert_ids_TLK, source.to_routing().expert_ids_TLK)
    result = CliRunner().invoke(cli, ["check", str(path)])
    assert result.exit_code == 0 and "600 tokens, 3 layers x 16 experts, top 4, counts" in result.stdout


def rewritten(path, change=lambda table: table, **header):
    table = change(pq.read_table(path))
    facts = json.loads(table.schema.metadata[METADATA_KEY]) | header
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(facts)}), path)


@pytest.mark.parametrize(
    ("header", "change", "said"),
    [
        ({"format": 9, "model": ""}, lambda t: t.drop(["count"]), "3 mistakes"),
        ({"top_k": None}, lambda t: t, "top_k must be a whole number from 1 to the 16 experts; given None"),
        ({"top_k": 9}, lambda t: t, "more than 1/9"),
        ({"origin": "trained"}, lambda t: t, "origin of a count trace"),
        ({}, lambda t: t.slice(1), "row 0: each window must have every layer"),
        ({}, lambda t: t.slice(0, 95), "row 95: .* given the end of the file"),
        ({}, lambda t: t.slice(0, 0), "no rows"),
        ({}, lambda t: t.set_column(3, "count", pa.array(np.arange(96.0))), "column count must be int64; given double"),
        ({}, lambda t: t.set_column(3, "count", pa.array([None, *range(95)])), "must not be null"),
        ({}, lambda t: t.set_column(3, "count", pa.array([-5, *range(95)])), "window 0, .* a count must not be neg"),
    ],
)
def test_broken_files_say_everything_at_once(tmp_path, header, change, said):
    path = tmp_path / "c.parquet"
    write_counts(made_counts(), path)
    rewritten(path, change, **header)
    with pytest.raises(ValueError, match=said) as error:
        load_trace(str(path))
    assert str(path) in str(error.value)


def test_no_file_is_left_of_counts_that_break_a_rule(tmp_path):
    with pytest.raises(ValueError, match="at least one count in every window"):
        write_counts(replace(made_counts(), counts_WLE=made_counts().counts_WLE * 0), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"\.parquet"):
        write_counts(made_counts(), tmp_path / "c.csv")
    with pytest.raises(ValueError, match="choose a writable folder"):
        write_counts(made_counts(), tmp_path / "none" / "c.parquet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ["simulate", "estimate"])
def test_a_run_on_counts_says_so(tmp_path, engine):
    write_counts(made_counts(1, tuple(range(16)), 64, 8, 256), tmp_path / "c.parquet")
    (tmp_path / "s.toml").write_text(
        f'model = "olmoe-1b-7b"\nhardware = "hgx-h100"\ntrace = "c.parquet"\nengine = "{engine}"\n'
        "[layout]\nattention = { dp = 8, tp = 1 }\nexperts = { ep = 8 }\n"
        "[workload]\nnum_requests = 16\noutput_tokens = 3\n"
    )
    (scenario,) = load(tmp_path / "s.toml")
    assert scenario.trace.origin == "counts"
    warnings = run(scenario).warnings
    assert any("made from expert counts" in warning for warning in warnings)
    trained = run(replace(scenario, trace=replace(scenario.trace, origin="trained")))
    assert not any("counts" in warning for warning in trained.warnings)
