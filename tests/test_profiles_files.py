"""Profiles as files: what is written comes back, what is broken is named, and what others publish is read right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.costs.measured import MeasuredTable, MeasuredTables
from moesim.files.profiles import import_profiles
from moesim.files.profiles.imported import merged, split
from moesim.files.profiles.tables import METADATA_KEY, PROVENANCE, load_profile, read_tables, write_tables

SAID = dict.fromkeys(PROVENANCE, "not said") | {"source": "a test", "licence": "CC0"}


def made(op="copy", dtype="bf16", axes=("size", "count"), points=((1, 1), (1, 2), (2, 1)), device="gpu", spread=True,
         facts=None, provenance=None):  # fmt: skip
    points_ND = np.array(points, np.float64)
    seconds = 1e-6 * points_ND.prod(axis=1)
    ends = (0.9 * seconds, 1.2 * seconds) if spread else (None, None)
    said = SAID if provenance is None else provenance
    return MeasuredTable(op, dtype, device, axes, points_ND, seconds, *ends, facts or {}, said)


def key(table):
    return (table.op, table.dtype, tuple(sorted(table.axes)), tuple(sorted(table.facts.items())))


def rows_of(table):
    """Rows of a table without an order: coordinates by name of the axis, then p20, p50, p80."""
    names = sorted(table.axes)
    columns = [table.coordinates()[name] for name in names]
    columns += [values for values in (table.low_N, table.seconds_N, table.high_N) if values is not None]
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


WORDS = st.text("abcXYZ019_- é", min_size=1, max_size=8)
TIMES = st.floats(1e-9, 1e3)


@st.composite
def tables(draw):
    """Up to five tables of one device that differ in operator, format, axes or facts."""
    found = {}
    for _ in range(draw(st.integers(1, 5))):
        axes = tuple(draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True)))
        point = st.tuples(*[st.floats(1e-3, 1e12) for _ in axes])
        points = np.array(draw(st.lists(point, min_size=1, max_size=6, unique=True)))
        times = np.sort(
            np.array(draw(st.lists(st.tuples(TIMES, TIMES, TIMES), min_size=len(points), max_size=len(points)))), axis=1
        )
        low, middle, high = times.T
        spread = draw(st.booleans())
        facts = draw(st.dictionaries(st.sampled_from(("backend", "kernel", "window")), WORDS, max_size=3))
        table = MeasuredTable(
            draw(st.sampled_from(("gemm", "copy"))), draw(WORDS), "gpu", axes, points, middle,
            low if spread else None, high if spread else None, facts, SAID,
        )  # fmt: skip
        found[key(table)] = table
    return list(found.values())


# --- our own files


@settings(max_examples=60, deadline=None)
@given(written=tables())
def test_what_is_written_comes_back(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("profiles") / "all.parquet"
    write_tables(written, path)
    read = {key(table): table for table in read_tables(path)}
    assert read.keys() == {key(table) for table in written}
    for table in written:
        again = read[key(table)]
        assert rows_of(again) == rows_of(table)
        assert (again.device, again.provenance) == ("gpu", SAID)
        assert (again.low_N is None) == (table.low_N is None)
    assert [file.name for file in path.parent.iterdir()] == ["all.parquet"]


def test_a_profile_is_a_file_or_a_folder_of_them(tmp_path):
    write_tables([made("copy"), made("gemm", "fp8", ("m", "n"))], tmp_path / "one.parquet")
    write_tables([made("moe", axes=("size",), points=((3,), (4,)), provenance=SAID | {"source": "another"})],
                 tmp_path / "two.parquet")  # fmt: skip
    (tmp_path / "notes.txt").write_text("not a table")
    assert isinstance(load_profile(tmp_path), MeasuredTables)
    assert {table.op for table in load_profile(tmp_path).tables} == {"copy", "gemm", "moe"}
    assert {table.op for table in load_profile(tmp_path / "one.parquet").tables} == {"copy", "gemm"}


def test_a_profile_is_of_one_device(tmp_path):
    write_tables([made()], tmp_path / "one.parquet")
    write_tables([made(device="another")], tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"holds tables of another, gpu; a profile is of one device: part them"):
        load_profile(tmp_path)


def test_no_profile(tmp_path):
    for path, said in (
        (tmp_path, "no .parquet file in it; make a profile with `moesim profile`"),
        (tmp_path / "nowhere.parquet", "no such file; write one with `moesim profile import`"),
        (tmp_path / "nowhere", "no such file"),
    ):
        with pytest.raises(ValueError, match="^" + str(path)) as error:
            load_profile(path)
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("given", "name", "said"),
    [
        ([], "p.parquet", "tables of one device and one provenance"),
        ([made(), made("gemm", device="another")], "p.parquet", "tables of one device and one provenance"),
        ([made(), made("gemm", provenance=SAID | {"date": "today"})], "p.parquet", "one device and one provenance"),
        ([made(), made(points=((5, 5),), spread=False)], "p.parquet", "2 tables of copy in bf16 have the same axes"),
        ([made()], "p.csv", "a profile is Parquet; give a name that ends with .parquet"),
        ([made(provenance={"source": "here"})], "p.parquet", "4 mistakes"),
        ([made(provenance=SAID | {"licence": ""})], "p.parquet", "provenance must say licence; 'not said' will do"),
        ([made(device="")], "p.parquet", "device must be the name of a device; given ''"),
        ([made(facts={"size": "big"})], "p.parquet", "size is the name of two columns; rename"),
        ([made(axes=("size", "p50_s"))], "p.parquet", "p50_s is the name of two columns; rename"),
    ],
)
def test_what_cannot_be_written(tmp_path, given, name, said):
    with pytest.raises(ValueError, match=said) as error:
        write_tables(given, tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_keeps_what_it_had(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "folder.parquet" / "mine").write_text("mine")
    write_tables([made()], tmp_path / "full.parquet")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def half(rows, where, **_):
        Path(where).write_bytes(b"PAR1 and so on")
        raise OSError(28, "No space left on device")

    for name in ("nowhere/p.parquet", "file/p.parquet", "folder.parquet", "full.parquet"):
        with monkeypatch.context() as patch:
            if name == "full.parquet":
                patch.setattr(pq, "write_table", half)
            with pytest.raises(ValueError, match="cannot write the profile: .*choose a writable folder"):
                write_tables([made("gemm")], tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def written(tmp_path):
    """A good file, as Arrow table and header."""
    write_tables([made(facts={"kernel": "one"}), made("gemm", axes=("m",), points=((1,), (2,)), spread=False)],
                 tmp_path / "p.parquet")  # fmt: skip
    rows = pq.read_table(tmp_path / "p.parquet")
    return rows, json.loads(rows.schema.metadata[METADATA_KEY])


def broken(tmp_path, rows, header):
    metadata = None if header is None else {METADATA_KEY: header if isinstance(header, bytes) else json.dumps(header)}
    pq.write_table(rows.replace_schema_metadata(metadata), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="mistake") as error:
        read_tables(tmp_path / "p.parquet")
    first, *mistakes = str(error.value).splitlines()
    assert first.startswith(f"{tmp_path / 'p.parquet'}: {len(mistakes)} mistake")
    return "\n".join(mistakes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, ["the schema metadata has no JSON object under 'moesim-profile'; write the file with moesim"]),
        (b"{", ["the schema metadata has no JSON object"]),
        (b"[1]", ["the schema metadata has no JSON object"]),
        ({"format": 2}, ["format must be 1; given 2; update moesim"]),
        ({"format": None, "device": 7}, ["format must be 1; given None", "device must be the name of a device; given 7"]),
        ({"axes": []}, ["axes must be a list of at least 1 names of columns; given []"]),
        ({"axes": "size", "facts": [1]}, ["axes must be a list", "facts must be a list of at least 0 names"]),
        ({"facts": ["kernel", "size"]}, ["size is the name of two columns"]),
        ({"provenance": None}, ["provenance must be an object of strings; given None"]),
        ({"provenance": {"source": 1}}, ["provenance must be an object of strings"]),
        ({"provenance": {"source": "x"}},
         [f"provenance must say {name}; 'not said' will do" for name in PROVENANCE if name != "source"]),
    ],
)  # fmt: skip
def test_a_broken_header_is_named(tmp_path, change, said):
    rows, header = written(tmp_path)
    found = broken(tmp_path, rows, header | change if isinstance(change, dict) else change)
    assert len(found.splitlines()) == len(said)
    for line in said:
        assert f"header: {line}" in found


def with_column(rows, name, values, kind=None):
    return rows.set_column(rows.column_names.index(name), name, pa.array(values, kind))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.drop_columns(["p50_s"]), "column p50_s must be there once; the file has op, dtype, kernel, "),
        (lambda rows: rows.append_column("size", rows["size"]), "column size must be there once"),
        (lambda rows: with_column(rows, "p50_s", [1, 2, 3, 4, 5]), "column p50_s must be double; given int64"),
        (lambda rows: with_column(rows, "op", ["copy"] * 5), "column op must be dictionary<values=string, indices=int32"),
        (lambda rows: with_column(rows, "p50_s", [1.0, None, 3.0, None, 5.0], pa.float64()),
         r"column p50_s: must not be null; fill it in \(2 rows\)"),
        (lambda rows: rows.set_column(0, "op", pa.array(["x", "x", "x", None, "x"]).dictionary_encode()),
         r"column op: must not be null; fill it in \(1 rows\)"),
        (lambda rows: with_column(rows, "p50_s", [1.0, 2.0, 3.0, -4.0, 5.0]),
         "column p50_s: must be positive and finite; given -4.0 in row 3"),
        (lambda rows: with_column(rows, "p50_s", [1.0, 2.0, 3.0, 4.0, np.nan]), "given nan in row 4"),
        (lambda rows: with_column(rows, "size", [1.0, 0.0, 2.0, None, None]),
         "column size: must be positive and finite; given 0.0 in row 1"),
        (lambda rows: rows.slice(0, 0), "no rows; a profile has at least one point"),
        (lambda rows: pa.concat_tables([rows, rows.slice(2, 1)]),
         r"copy in bf16 .*: two rows have the same coordinates; .* \(rows of the file: 0 to 5, 4 of them\)"),
        (lambda rows: with_column(rows, "p20_s", [1.0, 1e-9, 1e-9, None, None]),
         r"0 < p20 <= p50 <= p80 must hold; broken in row 0 \(rows of the file: 0 to 2"),
        (lambda rows: with_column(rows, "p20_s", [1e-9, None, 1e-9, None, None]),
         "0 < p20 <= p50 <= p80 must hold; broken in row 1"),
        (lambda rows: with_column(rows, "p80_s", [None] * 5, pa.float64()), "0 < p20 <= p50 <= p80 must hold"),
        (lambda rows: with_column(rows, "m", [None] * 5, pa.float64()), r"gemm .*: points must be rows x axes = 2 x 0"),
    ],
)  # fmt: skip
def test_a_broken_column_is_named(tmp_path, change, said):
    rows, header = written(tmp_path)
    found = broken(tmp_path, change(rows), header)
    assert len(found.splitlines()) == 1
    with pytest.raises(ValueError, match=said):
        read_tables(tmp_path / "p.parquet")


def test_all_broken_columns_are_named_at_once(tmp_path):
    rows, header = written(tmp_path)
    rows = with_column(rows.drop_columns(["p80_s"]), "p20_s", [0.0, 1.0, 1.0, 1.0, 1.0])
    found = broken(tmp_path, with_column(rows, "m", [1, 2, 3, 4, 5]), header)
    for name in ("p80_s", "p20_s", "m"):
        assert f"column {name}" in found


def test_a_file_that_is_not_whole(tmp_path):
    path = tmp_path / "p.parquet"
    write_tables([made()], path)
    whole = path.read_bytes()
    for damaged in (b"", b"op,dtype,size\n", whole[:-1], whole[: len(whole) // 2], whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="(?s)not a whole Parquet file .*; write the profile again"):
            read_tables(path)


def test_a_flipped_byte_of_a_page_is_found(tmp_path):
    """Whichever byte of the pages is flipped: their checksums, or the reader, see it, or nothing changes."""
    path = tmp_path / "p.parquet"
    write_tables([made()], path)
    whole = path.read_bytes()
    columns = pq.ParquetFile(path).metadata.row_group(0)
    pages = [columns.column(index) for index in range(columns.num_columns)]
    end = max(page.data_page_offset + page.total_compressed_size for page in pages)
    flips = range(4, min(end, len(whole) - 8), 3)
    found = 0
    for at in flips:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            read = read_tables(path)
        except ValueError as error:
            found += str(path) in str(error)
        else:
            assert [rows_of(table) for table in read] == [rows_of(made())]  # a byte that nothing reads
    assert found > 0.5 * len(flips)
