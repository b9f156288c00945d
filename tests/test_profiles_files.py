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
    with pytest.raises(ValueError, match=r"holds tables of another, gpu; a profile is of one device"):
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
            with pytest.raises(ValueError, match=r"cannot write the profile: .*choose a writable folder"):
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
        ({"format": None, "device": 7}, ["format must be 1; given None", "device must be the name of a device"]),
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
        (lambda rows: rows.drop_columns(["p50_s"]), "column p50_s must be there once; the file has op, dtype"),
        (lambda rows: rows.append_column("size", rows["size"]), "column size must be there once"),
        (lambda rows: with_column(rows, "p50_s", [1, 2, 3, 4, 5]), "column p50_s must be double; given int64"),
        (lambda rows: with_column(rows, "op", ["copy"] * 5), "column op must be dictionary<values=string"),
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
        with pytest.raises(ValueError, match=r"(?s)not a whole Parquet file .*; write the profile again"):
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


# --- what others publish


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.floats(1e-6, 1e-2)), min_size=1, max_size=20))
def test_repeated_points_become_their_median(rows):
    points, seconds = merged(np.array([row[:2] for row in rows], float), np.array([row[2] for row in rows]))
    want = {row[:2]: np.median([other[2] for other in rows if other[:2] == row[:2]]) for row in rows}
    assert {tuple(point): value for point, value in zip(points.tolist(), seconds, strict=True)} == pytest.approx(want)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(("", "b", None)), st.sampled_from("xy")), max_size=20))
def test_rows_are_parted_by_their_words(rows):
    names = ("one", "two", "three")
    columns = {name: pa.array([row[at] for row in rows], pa.string()) for at, name in enumerate(names)}
    parts = [(tuple(said.items()), which.tolist()) for said, which in split(columns)]
    want = {}
    for at, row in enumerate(rows):
        want.setdefault(tuple((name, word) for name, word in zip(names, row, strict=True) if word), []).append(at)
    assert dict(parts) == want
    assert len(parts) == len(want)


SYSTEM = "h100_sxm"
COMMON = {"framework": "VLLM", "version": "0.24.0", "device": "NVIDIA H100", "kernel_source": "default"}
GEMM = {"op_name": "gemm", "gemm_dtype": "bfloat16", "m": 1, "n": 256, "k": 512, "latency": 0.002}
MOE = {"op_name": "moe", "moe_dtype": "fp8_block", "num_tokens": 4, "hidden_size": 7168, "inter_size": 2048, "topk": 8,
       "num_experts": 256, "moe_tp_size": 1, "moe_ep_size": 1, "distribution": "power_law", "latency": 0.5}  # fmt: skip
HEADS = {"op_name": "attention", "batch_size": 2, "num_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "isl": 1,
         "step": 0, "attn_dtype": "bfloat16", "kv_cache_dtype": "fp8", "window_size": 0, "latency": 0.1}  # fmt: skip
NCCL = {"op_name": "all_gather", "nccl_dtype": "half", "num_gpus": 8, "message_size": 256, "latency": 0.01}
DEEPEP = {"op_name": "normal", "node_num": 2, "hidden_size": 7168, "num_token": 64, "num_topk": 8, "num_experts": 256}


def put(root, where, *rows):
    """A table of theirs, SYSTEM/FAMILY/BACKEND/VERSION/NAME, with the columns that all of them have."""
    path = root / f"{where}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([COMMON | row for row in rows]), path)
    return path


def points_of(table):
    """Seconds by the coordinates, in the order of the axes."""
    return dict(zip(map(tuple, table.points_ND.tolist()), table.seconds_N.tolist(), strict=True))


def only(found, name):
    """The one table of that name."""
    (table,) = found.tables[name]
    return table


def test_milliseconds_become_seconds_and_names_ours(tmp_path):
    put(tmp_path, f"{SYSTEM}/gemm/vllm/0.24.0/gemm_perf", GEMM, GEMM | {"m": 2, "latency": 0.003})
    found = import_profiles(tmp_path)
    table = only(found, "h100_sxm/vllm-0.24.0/gemm")
    assert (table.op, table.dtype, table.device, table.axes) == ("gemm", "bf16", SYSTEM, ("m", "n", "k"))
    assert points_of(table) == pytest.approx({(1, 256, 512): 2e-6, (2, 256, 512): 3e-6})
    assert table.facts == {"backend": "vllm", "version": "0.24.0", "kernel": "default"}
    assert table.provenance["source"] == f"NVIDIA aiconfigurator, {SYSTEM}/gemm/vllm/0.24.0/gemm_perf.parquet"
    assert set(table.provenance) >= set(PROVENANCE)
    assert found.read == [f"{SYSTEM}/gemm/vllm/0.24.0/gemm_perf.parquet: 2 rows, 2 points in 1 tables"]
    assert found.left_out == []


def test_formats_and_kernels_are_tables_of_their_own(tmp_path):
    rows = [GEMM, GEMM | {"gemm_dtype": "float16"}, GEMM | {"gemm_dtype": "fp8"}, GEMM | {"kernel_source": "cutlass"}]
    put(tmp_path, f"{SYSTEM}/gemm/vllm/0.24.0/gemm_perf", *rows)
    (found,) = import_profiles(tmp_path).tables.values()
    said = {(table.dtype, table.facts["kernel"]) for table in found}
    assert said == {("bf16", "default"), ("fp16", "default"), ("fp8", "default"), ("bf16", "cutlass")}


def test_message_sizes_are_elements(tmp_path):
    rows = [NCCL, NCCL | {"nccl_dtype": "int8", "op_name": "alltoall"}, NCCL | {"op_name": "alltoall"}]
    put(tmp_path, f"{SYSTEM}/comm/nccl/2.27/nccl_perf", *rows)
    each = {"allreduce_dtype": "bfloat16", "num_gpus": 2, "message_size": 128, "latency": 0.004, "backend": "graph"}
    put(tmp_path, f"{SYSTEM}/comm/vllm/1/custom_allreduce_perf", {"op_name": "all_reduce"} | each)
    found = import_profiles(tmp_path)
    said = {(table.op, table.dtype): points_of(table) for table in found.tables["h100_sxm/nccl-2.27/nccl"]}
    assert said == {
        ("all_gather", "fp16"): {(8, 512): pytest.approx(1e-5)},
        ("all_to_all", "int8"): {(8, 256): pytest.approx(1e-5)},
        ("all_to_all", "fp16"): {(8, 512): pytest.approx(1e-5)},
    }
    table = only(found, "h100_sxm/vllm-1/custom_allreduce")
    assert points_of(table) == {(2, 256): pytest.approx(4e-6)}
    assert (table.facts["backend"], table.facts["implementation"]) == ("vllm", "graph")


def test_a_shape_timed_more_than_once_has_the_median(tmp_path):
    put(tmp_path, f"{SYSTEM}/gemm/vllm/0.24.0/gemm_perf", *(GEMM | {"latency": ms} for ms in (0.009, 0.002, 0.003)))
    assert points_of(only(import_profiles(tmp_path), "h100_sxm/vllm-0.24.0/gemm")) == {(1, 256, 512): 3e-6}


def test_even_loads_over_several_ranks_are_left_out(tmp_path):
    even, spread = {"distribution": "balanced"}, {"moe_ep_size": 8}
    rows = [MOE, MOE | even, MOE | spread, MOE | even | spread]
    put(tmp_path, f"{SYSTEM}/moe/vllm/0.24.0/moe_perf", *rows)
    found = import_profiles(tmp_path)
    kept = {
        (table.facts["distribution"], ep)
        for table in found.tables["h100_sxm/vllm-0.24.0/moe"]
        for ep in table.coordinates()["ep"]
    }
    assert kept == {("power_law", 1), ("power_law", 8), ("balanced", 1)}
    assert found.left_out == [
        f"{SYSTEM}/moe/vllm/0.24.0/moe_perf.parquet: 1 rows, evenly loaded over several ranks: they contradict the "
        "uneven ones"
    ]


def test_a_copy_of_another_systems_table_is_left_out(tmp_path):
    rows = [GEMM, GEMM | {"m": 2, "latency": 0.0031}]
    for system in ("a100_sxm", SYSTEM):
        put(tmp_path, f"{system}/gemm/vllm/0.24.0/gemm_perf", *rows)
    put(tmp_path, "h200_sxm/gemm/vllm/0.24.0/gemm_perf", GEMM, GEMM | {"m": 2, "latency": 0.0032})
    found = import_profiles(tmp_path)
    assert {table.device for tables in found.tables.values() for table in tables} == {"a100_sxm", "h200_sxm"}
    assert found.left_out == [f"{SYSTEM}/gemm/vllm/0.24.0/gemm_perf.parquet: its times are a copy of those of a100_sxm"]


def test_waiting_for_stragglers_is_no_part_of_an_exchange(tmp_path):
    row = DEEPEP | {"dispatch_sms": 20, "dispatch_transmit_us": 37.0, "dispatch_notify_us": 1e6, "combine_sms": 24,
                    "combine_transmit_us": 48.0, "combine_notify_us": 1e6}  # fmt: skip
    put(tmp_path, f"{SYSTEM}/comm/sglang/1/wideep_deepep_normal_perf", row)
    low = DEEPEP | {"op_name": "ll", "dispatch_avg_t_us": 16.0, "combine_avg_t_us": 12.0}
    put(tmp_path, f"{SYSTEM}/comm/sglang/1/wideep_deepep_ll_perf", low)
    found = import_profiles(tmp_path)
    for name, want in (("normal", {"dispatch": (20, 37e-6), "combine": (24, 48e-6)}),
                       ("ll", {"dispatch": (None, 16e-6), "combine": (None, 12e-6)})):  # fmt: skip
        tables = found.tables[f"h100_sxm/sglang-1/wideep_deepep_{name}"]
        for table in tables:
            sms = table.coordinates().get("num_sms", [None])[0]
            assert (sms, table.seconds_N[0]) == (want[table.op][0], pytest.approx(want[table.op][1]))
            assert (table.facts["mode"], table.dtype) == (name, "bf16")
        assert {table.op for table in tables} == set(want)


def test_modules_and_unsound_tables_are_named_and_not_read(tmp_path):
    put(tmp_path, f"{SYSTEM}/mla/vllm/1/mla_context_module_perf", {"op_name": "mla_context_module", "latency": 1.0})
    put(tmp_path, "b200_sxm/attention/sglang/1/context_attention_perf", HEADS | {"isl": 64})
    put(tmp_path, "b200_sxm/attention/sglang/1/generation_attention_perf", HEADS)
    found = import_profiles(tmp_path)
    assert list(found.tables) == ["b200_sxm/sglang-1/generation_attention"]
    assert found.left_out == [
        "b200_sxm/attention/sglang/1/context_attention_perf.parquet: long prefills beat the device's peak",
        f"{SYSTEM}/mla/vllm/1/mla_context_module_perf.parquet: not one operator, or one that has no use here",
    ]


def test_attention_by_what_is_cached_before(tmp_path):
    rows = [HEADS | {"isl": 64}, HEADS | {"isl": 128, "latency": 0.3}, HEADS | {"isl": 64, "step": 512, "latency": 9.0}]
    put(tmp_path, f"{SYSTEM}/attention/vllm/1/context_attention_perf", *rows, rows[0] | {"window_size": 128})
    rows = [HEADS | {"step": 63}, HEADS | {"isl": 2, "step": 126, "latency": 0.2}]
    put(tmp_path, f"{SYSTEM}/attention/vllm/1/generation_attention_perf", *rows)
    found = import_profiles(tmp_path)
    prefill = {table.facts["window"]: table for table in found.tables["h100_sxm/vllm-1/context_attention"]}
    assert prefill["0"].axes == ("batch_size", "num_heads", "head_dim", "num_kv_heads", "seq_len")
    shape = (2, 32, 128, 8)
    assert points_of(prefill["0"]) == pytest.approx({(*shape, 64): 1e-4, (*shape, 128): 3e-4})
    assert points_of(prefill["128"]) == pytest.approx({(*shape, 64): 1e-4})
    assert (prefill["0"].dtype, prefill["0"].facts["cache_dtype"]) == ("bf16", "fp8")
    decode = only(found, "h100_sxm/vllm-1/generation_attention")
    assert points_of(decode) == pytest.approx({(*shape, 64): 1e-4, (*shape, 128): 2e-4})
    assert (decode.op, decode.dtype) == ("generation_attention", "fp8")
    said = f"{SYSTEM}/attention/vllm/1/context_attention_perf.parquet: 1 rows, prefill after a cached prefix"
    assert found.left_out == [said]


def test_times_that_are_none_make_no_points(tmp_path):
    bad = [GEMM | {"m": m, "latency": ms} for m, ms in ((2, 0.0), (3, -1.0), (4, float("nan")), (5, None), (0, 1.0))]
    put(tmp_path, f"{SYSTEM}/gemm/vllm/0.24.0/gemm_perf", GEMM, *bad)
    assert list(points_of(only(import_profiles(tmp_path), "h100_sxm/vllm-0.24.0/gemm"))) == [(1, 256, 512)]


def test_broken_tables_of_others_are_named(tmp_path):
    path = put(
        tmp_path, f"{SYSTEM}/gemm/vllm/0.24.0/gemm_perf", {name: GEMM[name] for name in GEMM if name not in "mk"}
    )
    with pytest.raises(ValueError, match=f"{path}: columns m, k lack; the file has framework, "):
        import_profiles(tmp_path)
    path.write_bytes(b"PAR1 not whole")
    with pytest.raises(ValueError, match=f"{path}: not a whole Parquet file .*; fetch it again"):
        import_profiles(tmp_path)


INFERSIM = {
    "gemm/h20/data.csv": "m,k,n,latency_us,mfu\n16,7168,1536,16.5,0.01\n16,7168,1536,17.5,0.01\n",
    "grouped_gemm/decode/h20/data.csv": (
        "num_experts,num_gpus,num_local_experts,topk,hidden_size,intermediate_size,batch_size_per_gpu,"
        "tokens_per_expert,up_proj_us,up_mfu,down_proj_us,down_mfu\n256,8,32,8,7168,2048,32,4,100.0,0.1,60.0,0.1\n"
    ),
    "mha/prefill/h20/32-8-128.csv": "dtype,seq_len,latency_us,mfu\nbf16,1024,90.0,0.6\n",
    "mha/decode/h20/32-8-128.csv": (
        "dtype,kv_dtype,batch_size,kv_len,latency_us,mfu\nbf16,bf16,1,1024,9.0,0.01\nbf16,fp8,4,1024,8.0,0.01\n"
    ),
    "mha/decode/h20/64-2-128.csv": "bf16,bf16,1,1024,25.4893,0.009\nbf16,bf16,1,4096,84.6816,0.011\n",
    "mla/decode/h20/128-512-64.csv": "dtype,kv_dtype,batch_size,kv_len,latency_us,mfu\nbf16,bf16,2,1024,21.0,0.01\n",
    "mla/prefill/h800/128-128-64.csv": "dtype,seq_len,latency_us,mfu\nbf16,1024,117.0,0.4\n",
    "dsa/decode/h800/attn-128-576-2048.csv": "dtype,kv_dtype,batch_size,kv_len,latency_us,mfu\nbf16,fp8,64,1,9.5,0.1\n",
    "gdn/prefill/h20/4-16-128-64-128.csv": "seq_len,conv\n4096,65\n",
}


def infersim(root, **changes):
    for where, text in (INFERSIM | changes).items():
        (root / where).parent.mkdir(parents=True, exist_ok=True)
        (root / where).write_text(text)
    return root


def test_infersim(tmp_path):
    found = import_profiles(infersim(tmp_path))
    assert list(found.tables) == ["h20/infersim", "h800/infersim"]
    said = {(table.op, table.dtype): (table, points_of(table)) for table in found.tables["h20/infersim"]}
    assert len(said) == len(found.tables["h20/infersim"]) == 6
    assert said["gemm", "fp8_block"][0].axes == ("m", "n", "k")  # theirs are m, k, n
    assert said["gemm", "fp8_block"][1] == pytest.approx({(16, 1536, 7168): 17e-6})
    table, points = said["grouped_gemm", "fp8_block"]
    assert table.axes == ("num_experts", "m", "n", "k")
    assert points == pytest.approx({(32, 4, 4096, 7168): 100e-6, (32, 4, 7168, 2048): 60e-6})
    assert table.facts == {"backend": "infersim", "phase": "decode", "distribution": "balanced"}
    table, points = said["context_attention", "bf16"]
    assert table.axes == ("batch_size", "num_heads", "num_kv_heads", "head_dim", "seq_len")
    assert points == pytest.approx({(1, 32, 8, 128, 1024): 90e-6})
    # The second file has lost its head.
    assert said["generation_attention", "bf16"][1] == pytest.approx(
        {(1, 32, 8, 128, 1024): 9e-6, (1, 64, 2, 128, 1024): 25.4893e-6, (1, 64, 2, 128, 4096): 84.6816e-6}
    )
    assert said["generation_attention", "fp8"][1] == pytest.approx({(4, 32, 8, 128, 1024): 8e-6})  # the cache's format
    table, points = said["generation_mla", "bf16"]
    assert (table.axes, table.facts["head_dims"]) == (("batch_size", "num_heads", "kv_len"), "128-512-64")
    assert points == pytest.approx({(2, 128, 1024): 21e-6})
    assert only(found, "h800/infersim").op == "context_mla"
    assert len(found.read) == 7
    assert found.left_out == [
        "dsa/decode/h800/attn-128-576-2048.csv: an operator that has no use here",
        "gdn/prefill/h20/4-16-128-64-128.csv: an operator that has no use here",
    ]


@pytest.mark.parametrize(
    ("where", "text", "said"),
    [
        ("gemm/h20/data.csv", "m,k,latency_us\n1,2,3.5\n", "line 2: column 'n' lacks; fetch the file again"),
        ("gemm/h20/data.csv", "m,k,n,latency_us\n1,2,3,3.5\n1,2\n", "line 3: column 'n' lacks"),
        ("gemm/h20/data.csv", "m,k,n,latency_us\n1,2,x,3.5\n", "line 2: could not convert string to float: 'x'"),
        ("gemm/h20/data.csv", "m,k,n,latency_us\n1,2,3,0\n", "line 2: latency_us must be positive and finite, not 0"),
        ("gemm/h20/data.csv", "m,k,n,latency_us\n1,-2,3,nan\n", "line 2: k must be positive and finite, not -2"),
        ("mha/decode/h20/64-2-128.csv", "bf16,bf16,1,1024,oops,0.01\n", "line 1: could not convert"),
        (
            "mha/decode/h20/64-2.csv",
            "dtype,kv_dtype\nbf16,bf16\n",
            "line 2: the path must be mha/prefill|decode/DEVICE",
        ),
        ("mha/h20/64-2-128.csv", "dtype,kv_dtype\nbf16,bf16\n", "line 2: the path must be mha/prefill|decode/DEVICE/"),
    ],
)
def test_broken_infersim_files_are_named(tmp_path, where, text, said):
    with pytest.raises(ValueError, match="fetch the file again") as error:
        import_profiles(infersim(tmp_path, **{where: text}))
    assert str(error.value).startswith(f"{tmp_path / where}: {said}")


# --- the command


def moesim(*args):
    done = subprocess.run(
        [sys.executable, "-m", "moesim", *map(str, args)], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    return done


def test_import_command(tmp_path):
    put(tmp_path / "a", f"{SYSTEM}/gemm/vllm/0.24.0/gemm_perf", GEMM, GEMM | {"m": 2})
    put(
        tmp_path / "a",
        f"{SYSTEM}/mla/vllm/1/mla_context_module_perf",
        {"op_name": "mla_context_module", "latency": 1.0},
    )
    put(tmp_path / "a", f"{SYSTEM}/comm/nccl/2/nccl_perf", NCCL | {"latency": 0.0})
    out = tmp_path / "new" / "a"
    done = moesim("profile", "import", tmp_path / "a", "-o", out)
    assert done.returncode == 0
    assert done.stdout == f"{out}/h100_sxm/vllm-0.24.0/gemm.parquet: 2 points in 1 tables of h100_sxm\n"
    assert "read: h100_sxm/gemm/vllm/0.24.0/gemm_perf.parquet: 2 rows, 2 points in 1 tables\n" in done.stderr
    assert "read: h100_sxm/comm/nccl/2/nccl_perf.parquet: 1 rows, 0 points in 0 tables\n" in done.stderr
    assert "left out: h100_sxm/mla/vllm/1/mla_context_module_perf.parquet: not one operator" in done.stderr
    profile = load_profile(out)
    assert profile.seconds("gemm", "bf16", {"m": 2, "n": 256, "k": 512}).seconds[0] == pytest.approx(2e-6)
    done = moesim("profile", "import", infersim(tmp_path / "b"), "-o", out, "--format", "infersim")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        f"{out}/h20/infersim.parquet: 9 points in 6 tables of h20",
        f"{out}/h800/infersim.parquet: 1 points in 1 tables of h800",
    ]
    assert ("grouped_gemm", "fp8_block") in load_profile(out / "h20/infersim.parquet")


def test_import_command_refuses(tmp_path):
    put(tmp_path / "a", f"{SYSTEM}/gemm/vllm/0.24.0/gemm_perf", GEMM)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for args, said in (
        ((tmp_path / "nowhere",), "nowhere: no such folder; give the one that holds the tables"),
        (
            (tmp_path / "empty",),
            "empty: no SYSTEM/FAMILY/BACKEND/VERSION/TABLE.parquet and no OPERATOR/[PHASE/]DEVICE/",
        ),
        ((tmp_path / "empty", "--format", "aiconfigurator"), "empty: no SYSTEM/FAMILY/BACKEND/VERSION/TABLE.parquet"),
        ((tmp_path / "a", "--format", "infersim"), "a: no OPERATOR/[PHASE/]DEVICE/FILE.csv"),
        ((tmp_path / "a", "--format", "other"), "Invalid value for '--format'"),
        (
            (tmp_path / "a", "-o", tmp_path / "file"),
            "cannot make the folder: Not a directory; choose a writable place",
        ),
    ):
        done = moesim("profile", "import", "-o", tmp_path / "out", *args)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
    assert not (tmp_path / "out").exists()
