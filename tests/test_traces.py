"""Trace files: what is written is read back; what is wrong is said, all at once, in one ValueError."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cli import cli
from moesim.files.traces import TraceWriter, read_trace, write_trace
from moesim.routing.trace import RoutingTrace

ARRAYS = (
    "expert_ids_TLK",
    "request_T",
    "position_T",
    "is_decode_T",
    "token_id_T",
    "weights_TLK",
    "scores_TLE",
)


def made_trace(
    seed=0, lengths=(3, 5), layers=(1, 2, 4), experts=8, top_k=2, weights=True, horizons=1, width=2, scores=False,
    first_request=0,
):  # fmt: skip
    """A right trace; `lengths` are tokens per request, the later half of which decode."""
    random = np.random.default_rng(seed)
    num_tokens = sum(lengths)
    small = np.uint8 if experts <= 256 else np.uint16

    def ids(num_layers, width):
        shuffled = random.random((num_tokens, num_layers, experts))
        return shuffled.argsort(axis=2)[:, :, :width].astype(small)

    return RoutingTrace(
        name="made",
        model="made up",
        origin="synthetic",
        num_experts=experts,
        expert_ids_TLK=ids(len(layers), top_k),
        request_T=np.repeat(np.arange(len(lengths)) + first_request, lengths).astype(np.int32),
        position_T=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        is_decode_T=np.concatenate([np.arange(n) >= n // 2 for n in lengths]),
        token_id_T=random.integers(0, 1000, num_tokens).astype(np.int32),
        layers=layers,
        weights_TLK=random.random((num_tokens, len(layers), top_k)).astype(np.float16) if weights else None,
        predicted_HTLW=tuple(ids(max(len(layers) - h, 0), min(width, experts)) for h in range(1, horizons + 1)),
        scores_TLE=random.normal(size=(num_tokens, len(layers), experts)).astype(np.float16) if scores else None,
        provenance={"date": "today"},
    )


def assert_same(a, b):
    for field in ("name", "model", "origin", "num_experts", "layers"):
        assert getattr(a, field) == getattr(b, field)
    assert dict(a.provenance) == dict(b.provenance)
    for field in ARRAYS:
        one, other = getattr(a, field), getattr(b, field)
        assert (one is None) == (other is None), field
        if one is not None:
            assert one.dtype == other.dtype, field
            np.testing.assert_array_equal(one, other, err_msg=field)
    assert len(a.predicted_HTLW) == len(b.predicted_HTLW)
    for one, other in zip(a.predicted_HTLW, b.predicted_HTLW, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    layers=st.sets(st.integers(0, 90), min_size=1, max_size=4),
    experts=st.sampled_from([1, 4, 256, 257]),
    top_k=st.integers(1, 4),
    weights=st.booleans(),
    tokens=st.booleans(),
    horizons=st.integers(0, 3),
    width=st.integers(1, 5),
    scores=st.booleans(),
)
def test_round_trip(tmp_path_factory, seed, lengths, layers, experts, top_k, weights, tokens, horizons, width, scores):
    layers, top_k = tuple(sorted(layers)), min(top_k, experts)
    trace = made_trace(seed, lengths, layers, experts, top_k, weights, horizons, width, scores)
    trace = trace if tokens else replace(trace, token_id_T=None)
    folder = tmp_path_factory.mktemp("trace")
    for path in (folder / "t.parquet", folder / "t.arrow"):
        write_trace(trace, path)
        assert_same(trace, read_trace(path))


def test_an_arrow_file_is_mapped_not_copied(tmp_path):
    trace = made_trace(lengths=(300, 500), horizons=0)
    write_trace(trace, tmp_path / "t.arrow")
    before = pa.total_allocated_bytes()
    read = read_trace(tmp_path / "t.arrow")
    assert not read.expert_ids_TLK.flags.owndata and not read.expert_ids_TLK.flags.writeable
    assert pa.total_allocated_bytes() == before  # Arrow holds nothing of it in memory of its own
    assert_same(trace, read)


def test_file_is_a_plain_table(tmp_path):
    """One row per (token, layer), with the columns of the documentation."""
    trace = made_trace()
    write_trace(trace, tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.num_rows == 8 * 3
    assert table.column_names == [
        "request",
        "position",
        "phase",
        "token_id",
        "layer",
        "expert_ids",
        "weights",
        "predicted_ids",
    ]
    first = table.slice(0, 3).to_pylist()
    assert [row["layer"] for row in first] == [1, 2, 4]
    assert first[0]["phase"] == "prefill"
    assert first[1]["expert_ids"] == trace.expert_ids_TLK[0, 1].tolist()
    assert [row["predicted_ids"] is None for row in first] == [False, False, True]
    header = json.loads(table.schema.metadata[b"moesim"])
    assert header["num_experts"] == 8 and header["origin"] == "synthetic"


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_parts_written_one_by_one_make_the_same_trace(tmp_path, name):
    whole = made_trace(lengths=(3, 5, 2))
    path = tmp_path / name
    with TraceWriter(path) as writer:
        for keep in (whole.request_T == 0, whole.request_T > 0):
            writer.append(whole.take(keep))
        assert not path.exists(), "the file must not appear before it is whole"
    assert_same(whole, read_trace(path))
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_parts_that_disagree_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)header: every part.*weights column.*later requests than 1"):  # noqa: SIM117
        with TraceWriter(tmp_path / "t.parquet") as writer:
            writer.append(made_trace())
            writer.append(replace(made_trace(weights=False), name="other"))
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.parquet"
    write_trace(made_trace(seed=1), path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), TraceWriter(path) as writer:
        writer.append(made_trace(seed=2))
        raise RuntimeError
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_empty_traces_are_not_written(tmp_path):
    nothing = made_trace().take(slice(0))
    with pytest.raises(ValueError, match="empty"):
        write_trace(nothing, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="empty"), TraceWriter(tmp_path / "t.parquet"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place(tmp_path):
    with pytest.raises(ValueError, match="cannot write"):
        write_trace(made_trace(), tmp_path / "none" / "t.parquet")
    with pytest.raises(ValueError, match="cannot write"):
        write_trace(made_trace(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def written_table(tmp_path, **changes):
    write_trace(replace(made_trace(), **changes), tmp_path / "good.parquet")
    return pq.read_table(tmp_path / "good.parquet")


def read_changed(tmp_path, table):
    path = tmp_path / "bad.parquet"
    pq.write_table(table, path)
    with pytest.raises(ValueError) as raised:
        read_trace(path)
    assert str(path) in str(raised.value)
    return str(raised.value)


def with_values(table, column, change):
    """The table with `change(list of values)` in place of a column."""
    values = table[column].to_pylist()
    change(values)
    index = table.column_names.index(column)
    kind = table.schema.field(column).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float16():
        values = [None if v is None else [np.float16(x) for x in v] for v in values]
    array = pa.array(values, plain)
    return table.set_column(
        index, table.schema.field(column), array.dictionary_encode().cast(kind) if plain is not kind else array
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_bytes(b"PAR1 not really"), "not a whole Parquet file"),
        (lambda path: path.write_text("request,position\n1,2\n"), "not a whole Parquet file"),
        (lambda path: path.write_bytes(b"ARROW1 not really"), "not a whole Arrow file"),
    ],
)
def test_no_trace_at_all(tmp_path, make, says):
    path = tmp_path / "t.parquet"
    make(path)
    with pytest.raises(ValueError, match=says) as raised:
        read_trace(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(("name", "kind"), [("t.parquet", "Parquet"), ("t.arrow", "Arrow")])
def test_truncated_file(tmp_path, name, kind, share):
    path = tmp_path / name
    write_trace(made_trace(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=f"not a whole {kind} file"):
        read_trace(path)


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_damaged_bytes_never_escape_as_another_error(tmp_path, name, flip):
    path = tmp_path / name
    trace = made_trace(horizons=3, scores=True)
    write_trace(trace, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        try:
            read = read_trace(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # where nothing is found, at least what Parquet has checksums of is as it was
            if name == "t.parquet":
                np.testing.assert_array_equal(read.expert_ids_TLK, trace.expert_ids_TLK)


def test_foreign_table_lists_every_lacking_column(tmp_path):
    said = read_changed(tmp_path, pa.table({"a": [1, 2]}))
    for column in ("request", "position", "phase", "layer", "expert_ids"):
        assert f"column {column} lacks" in said
    assert "no key 'moesim'" in said


def test_wrong_types(tmp_path):
    table = written_table(tmp_path)
    index = table.column_names.index("layer")
    table = table.set_column(index, "layer", table["layer"].cast(pa.float64()))
    assert "column layer must be int16; given double" in read_changed(tmp_path, table)


def test_a_column_that_stands_there_twice(tmp_path):
    table = written_table(tmp_path)
    table = table.append_column("layer", table["layer"])
    assert "column layer stands there more than once" in read_changed(tmp_path, table)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (None, "no key 'moesim'"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "format must be 1"),
        (
            b'{"format": 1, "name": "a", "model": "b", "origin": "guessed", "num_experts": 0, "provenance": {"a": 1}}',
            "origin must be one of",
        ),
    ],
)
def test_wrong_header(tmp_path, metadata, says):
    table = written_table(tmp_path)
    said = read_changed(tmp_path, table.replace_schema_metadata(metadata and {b"moesim": metadata}))
    assert says in said
    if says.startswith(("format", "origin")):
        assert "num_experts must be" in said and "provenance must map" in said


def test_no_rows(tmp_path):
    assert "the trace is empty" in read_changed(tmp_path, written_table(tmp_path).slice(0, 0))


def test_ids_and_weights_all_mistakes_at_once(tmp_path):
    table = written_table(tmp_path)
    table = with_values(table, "expert_ids", lambda v: v.__setitem__(4, [3, 8]))
    table = with_values(table, "expert_ids", lambda v: v.__setitem__(7, [5, 5]))
    table = with_values(table, "predicted_ids", lambda v: v.__setitem__(3, [1, 9]))
    table = with_values(table, "weights", lambda v: v.__setitem__(10, [float("nan"), 0.5]))
    table = with_values(table, "weights", lambda v: v.__setitem__(11, [0.5, -0.25]))
    said = read_changed(tmp_path, table)
    assert "4 mistakes" in said
    assert "column expert_ids, row 4: expert ids must be below num_experts = 8; given [3, 8]" in said
    assert "column expert_ids, row 7: a token's experts must be distinct; given [5, 5]" in said
    assert "column predicted_ids, row 3: expert ids must be below" in said
    assert "column weights, row 10: gate weights must be finite and not negative; given [nan, 0.5]" in said
    assert "(2 rows)" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1e-7])
def test_weights_that_are_no_weights(tmp_path, value):
    table = with_values(written_table(tmp_path), "weights", lambda v: v.__setitem__(5, [value, 0.5]))
    assert "column weights, row 5" in read_changed(tmp_path, table)


def test_minus_zero_is_a_weight(tmp_path):
    weights = made_trace().weights_TLK.copy()
    weights[0, 0] = -0.0
    write_trace(replace(made_trace(), weights_TLK=weights), tmp_path / "t.parquet")
    read_trace(tmp_path / "t.parquet")


def test_layers_lacking_for_some_tokens(tmp_path):
    table = written_table(tmp_path)
    rows = [row for row in range(table.num_rows) if row not in (5, 13)]
    said = read_changed(tmp_path, table.take(rows))
    assert "column layer, row 3: each token must have the layers [1, 2, 4]" in said
    assert "request 0 position 1 has [1, 2]" in said and "(2 tokens)" in said


def test_rows_out_of_order(tmp_path):
    table = written_table(tmp_path)
    swapped = [3, 4, 5, 0, 1, 2, *range(6, table.num_rows)]
    assert "must be sorted by (request, position)" in read_changed(tmp_path, table.take(swapped))
    assert "in this order" in read_changed(tmp_path, table.take([1, 0, *range(2, table.num_rows)]))
    repeated = [0, 1, 2, 0, 1, 2, *range(3, table.num_rows)]
    assert "once" in read_changed(tmp_path, table.take(repeated))


@pytest.mark.parametrize(
    ("column", "row", "value", "says"),
    [
        ("token_id", 4, 77777, "column token_id, row 4: must be the same in every layer of a token"),
        ("phase", 1, "decode", "column phase, row 1: must be the same in every layer"),
        ("phase", 1, "warm-up", "must be prefill or decode"),
        ("request", 2, None, "column request, row 2: must not be null"),
        ("expert_ids", 2, None, "column expert_ids, row 2: must not be null"),
        ("predicted_ids", 3, None, "column predicted_ids, row 3: must be given"),
        ("predicted_ids", 5, [1, 2], "column predicted_ids, row 5: must be null"),
    ],
)
def test_one_wrong_cell(tmp_path, column, row, value, says):
    table = with_values(written_table(tmp_path), column, lambda v: v.__setitem__(row, value))
    assert says in read_changed(tmp_path, table)


def test_negative_facts_and_decode_before_prefill(tmp_path):
    trace = made_trace()
    bad = replace(
        trace, token_id_T=trace.token_id_T - 5000, is_decode_T=~trace.is_decode_T, position_T=trace.position_T - 1
    )
    with pytest.raises(ValueError) as raised:
        write_trace(bad, tmp_path / "t.parquet")
    for says in ("column token_id", "column position", "prefill must come before decode"):
        assert says in str(raised.value)


def test_a_null_inside_a_list(tmp_path):
    table = with_values(written_table(tmp_path), "expert_ids", lambda v: v.__setitem__(0, [1, None]))
    assert "no value inside a list may be null" in read_changed(tmp_path, table)


def test_more_experts_per_token_than_experts(tmp_path):
    with pytest.raises(ValueError, match="cannot choose 2 of 1 experts"):
        write_trace(replace(made_trace(), num_experts=1), tmp_path / "t.parquet")


def test_mistakes_of_every_kind_are_told_in_one_go(tmp_path):
    """Lacking layers hide neither a wrong id, nor a wrong weight, nor a wrong type, nor a wrong header."""
    table = written_table(tmp_path)
    table = with_values(table, "expert_ids", lambda v: v.__setitem__(4, [3, 8]))
    table = with_values(table, "weights", lambda v: v.__setitem__(10, [float("nan"), 0.5]))
    table = with_values(table, "position", lambda v: v.__setitem__(slice(0, 3), [-1, -1, -1]))
    index = table.column_names.index("token_id")
    table = table.set_column(index, "token_id", table["token_id"].cast(pa.int64()))
    header = json.loads(table.schema.metadata[b"moesim"]) | {"origin": "guessed"}
    table = table.replace_schema_metadata({b"moesim": json.dumps(header)})
    said = read_changed(tmp_path, table.take([row for row in range(table.num_rows) if row != 20]))
    for words in (
        "6 mistakes",
        "header: origin must be one of",
        "column token_id must be int32; given int64",
        "column layer, row 18: each token must have the layers [1, 2, 4]",
        "column position, row 0: must not be negative; given -1 (3 rows)",
        "column expert_ids, row 4: expert ids must be below num_experts = 8; given [3, 8]",
        "column weights, row 10: gate weights must be finite",
    ):
        assert words in said, said


def test_moesim_trace_check(tmp_path):
    good, bad = tmp_path / "good.arrow", tmp_path / "bad.parquet"
    write_trace(made_trace(), good)
    table = with_values(written_table(tmp_path), "weights", lambda v: v.__setitem__(10, [float("nan"), 0.5]))
    pq.write_table(with_values(table, "expert_ids", lambda v: v.__setitem__(7, [5, 5])), bad)
    ran = CliRunner().invoke(cli, ["trace", "check", str(good), str(bad), "olmoe-shape-16x64"])
    assert ran.exit_code == 2
    assert f"{good}: trace of 8 tokens, 3 layers x 8 experts, top 2, synthetic" in ran.stdout
    assert "olmoe-shape-16x64: trace of" in ran.stdout
    assert f"error: {bad}: not a right routing trace, 2 mistakes" in ran.stderr
    assert "column expert_ids, row 7" in ran.stderr and "column weights, row 10" in ran.stderr
    assert CliRunner().invoke(cli, ["trace", "check", str(good)]).exit_code == 0


def test_a_million_rows_are_read_in_seconds(tmp_path):
    part = made_trace(lengths=(500,), layers=tuple(range(16)), experts=64, top_k=8)
    trace = replace(part.take(np.tile(np.arange(500), 125)), request_T=np.repeat(np.arange(125, dtype=np.int32), 500))
    write_trace(trace, tmp_path / "t.parquet")
    start = time.process_time()
    assert read_trace(tmp_path / "t.parquet").num_tokens == 62_500
    assert time.process_time() - start < 5
