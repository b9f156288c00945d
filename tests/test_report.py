"""What a report must keep: totals that add up, names that stay names, the same bytes for the same run."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moesim.report.html import answer, page, write_html
from moesim.report.perfetto import MOST_FLOWS_INTO_ONE, trace, write_perfetto
from moesim.report.tables import between, label_of, number, quantity, result_tables, unit_of
from moesim.results import Record, Result

GIB = 2.0**30


def timeline(num_ranks: int = 4, num_layers: int = 3) -> tuple[Record, ...]:
    """Attention, an exchange that waits for all ranks, experts; times that no float holds exactly."""
    records: list[Record] = []
    start_s = 0.0
    for layer in range(num_layers):
        before = [len(records) + rank for rank in range(num_ranks)]
        for rank in range(num_ranks):
            finish_s = start_s + 1e-4 / 3
            records.append(Record("attention", "decode", 0, layer, rank, "compute", start_s, finish_s, 1e6))
        for rank in range(num_ranks):
            sent_s = finish_s + 1e-5 / 7
            records.append(Record("dispatch", "decode", 0, layer, rank, "nvlink", finish_s, sent_s, 0.5, tuple(before)))
        for rank in range(num_ranks):
            after = (len(records) - num_ranks,)
            done_s = sent_s + (rank + 1) * 1e-5
            records.append(Record("experts", "decode", 0, layer, rank, "compute", sent_s, done_s, 2e6, after))
        start_s = sent_s + num_ranks * 1e-5
    return tuple(records)


EP8 = Result(
    name="EP8",
    scenario={"model": "tiny", "layout": {"ep": 8}},
    engine="simulate",
    seed=7,
    version="0.1.0",
    metrics={"tpot_s": 0.0102, "output_tokens_per_s": 12300.0, "cache_hit_rate": 0.812, "num_requests": 1500},
    intervals={"output_tokens_per_s": (10100.0, 14800.0)},
    provenance={"measured_fraction": 0.6, "fitted_fraction": 0.4},
    breakdown_s={"decode": {"experts": 4e-3, "attention": 2e-3, "imbalance": 1e-3, "zero": 0.0}},
    memory_bytes={"weights": 30 * GIB, "kv_cache": 20 * GIB, "capacity": 80 * GIB},
    load_LR=((10, 30, 20, 20), (5, 5, 5, 5)),
    step_s=(0.010, 0.011, 0.0095),
    records=timeline(),
    warnings=("only 3 topics",),
)
TP8 = replace(
    EP8,
    name="TP8",
    metrics={"output_tokens_per_s": 9800.0},
    intervals={"output_tokens_per_s": (8000.0, 11800.0)},
)
EMPTY = Result("empty", {}, "estimate", 0, "0.1.0", {}, breakdown_s={"decode": {}})
EVIL = replace(EP8, name='<b>"bold"</b> & $x_1$', scenario={"note": "</pre><script>alert(1)</script>"})


def shown(results: list[Result], width: int = 80) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        for table in result_tables(results, width):
            console.print(table)
    return capture.get()


def test_numbers_read_like_speech() -> None:
    unit = unit_of("output_tokens_per_s", [12300.0])
    assert quantity(12300.0, unit) + " " + between((10100.0, 14800.0), unit) == "12.3 k (10.1 \u2013 14.8 k)"
    assert quantity(9.81e-3, unit_of("tpot_s", [9.81e-3])) == "9.81 ms"
    assert quantity(0.25, unit_of("hit_rate", [0.25])) == "25.0 %"
    assert quantity(1.32, unit_of("imbalance_ratio", [1.32])) == "1.32"
    assert quantity(3 * GIB, unit_of("peak_bytes", [3 * GIB])) == "3.00 GiB"
    assert quantity(3.35e12, unit_of("hbm_bytes_per_s", [3.35e12])) == "3.35 TB/s"
    assert quantity(0.4, unit_of("joules_per_token", [0.4])) == "400 mJ"
    assert label_of("peak_memory_bytes") == "Peak memory"
    assert [number(value) for value in (float("nan"), float("inf"), 1e-9, 999.96)] == [
        "n/a",
        "∞",
        "0.000000",
        "1,000",
    ]


def test_tables_show_sums_and_every_setup() -> None:
    text = shown([EP8, TP8, EMPTY])
    assert re.search(r"Iteration +7\.000 ms +100 % +7\.000 ms +100 % +\u2013", text)
    assert re.search(r"Used +50\.0 GiB +62 %", text)
    assert re.search(r"Capacity +80\.0 GiB", text)
    assert "12.3 k" in text and "(10.1 \u2013 14.8 k)" in text and "81.2 %" in text and "1,500" in text
    assert "Zero" not in text
    assert "only 3 topics" in text and "EP8, TP8" in text


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal(width: int) -> None:
    results = [replace(EP8, name=f"set-up number {index}") for index in range(7)]
    lines = shown(results, width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any("\u2026" in line for line in lines)


def test_markup_in_names_is_only_text() -> None:
    text = shown([replace(EP8, name="[bold]x[/bold]", warnings=("[red]odd[/red]",))])
    assert "[bold]x[/bold]" in text and "[red]odd[/red]" in text


def test_nothing_to_show_is_an_error() -> None:
    with pytest.raises(ValueError, match="no results"):
        result_tables([])
    with pytest.raises(ValueError, match="no results"):
        page([])


class Reader(HTMLParser):
    """Tags, ids and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    return reader


def test_page_is_complete_and_self_contained() -> None:
    text = page([EP8, TP8, EMPTY])
    reader = read(text)
    for name in ("EP8", "TP8", "empty"):
        assert name in reader.text
    assert reader.tags.count("svg") == 6
    assert "http" not in text and "script" not in reader.tags and "link" not in reader.tags
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    targets = re.findall(r'href="([^"]*)"', text)
    assert all(target.startswith("data:image/png") or target[1:] in reader.ids for target in targets)
    assert "seed 7" in reader.text and "only 3 topics" in reader.text


def test_page_escapes_what_people_wrote() -> None:
    text = page([EVIL, TP8])
    reader = read(text)
    assert reader.tags.count("b") == len({*EVIL.warnings})
    assert "<script" not in text and "<b>&quot;" not in text and '<b>"' not in text
    assert EVIL.name in reader.text


def test_page_of_nothing_but_a_name() -> None:
    reader = read(page([EMPTY]))
    assert "svg" not in reader.tags
    assert "no throughput was reported" in reader.text


def test_page_with_zero_values() -> None:
    zero = replace(
        EP8,
        metrics={"output_tokens_per_s": 0.0, "tpot_s": float("nan")},
        intervals={},
        breakdown_s={"decode": {"experts": 0.0}},
        load_LR=((0, 0), (0, 0)),
        step_s=(0.0,),
        provenance={"measured_fraction": 0.0},
    )
    assert "n/a" in page([zero])
    assert "n/a" in page([zero, EP8])


def test_same_results_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_html([EP8, TP8], tmp_path / f"{name}.html")
        write_perfetto([EP8, TP8], tmp_path / f"{name}.json.gz")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    page([EP8])
    assert dict(matplotlib.rcParams) == before


def test_answer_ranks_and_says_how_sure() -> None:
    said = answer([TP8, EP8])
    assert said.startswith("EP8 is the fastest of 2 set-ups with 12.3 k output tokens/s")
    assert "1.26 times TP8" in said and "not certain" in said and "computing the experts (57 %)" in said
    sure = answer([replace(TP8, intervals={}), EP8])
    assert "not certain" not in sure
    assert answer([EP8]).startswith("EP8 reaches 12.3 k")


def test_answer_ranks_by_latency_where_there_is_no_throughput() -> None:
    slow, fast = (replace(EP8, name=name, metrics={"tpot_s": s}) for name, s in (("slow", 0.02), ("fast", 0.01)))
    said = answer([slow, fast])
    assert said.startswith("fast is the fastest of 2 set-ups with 10.0 ms per token") and "2.00 times slow" in said


@pytest.mark.parametrize("write", [write_html, write_perfetto])
def test_bad_paths_are_named(write: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder") as error:
        write([EP8], tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ValueError, match="no folder") as error:
        write([EP8], tmp_path / "absent" / "x.out")
    assert "absent" in str(error.value)
    assert list(tmp_path.iterdir()) == []


Slices = dict[tuple[int, int], list[dict[str, Any]]]


def slices_of(events: list[dict[str, Any]]) -> Slices:
    tracks: Slices = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
    return tracks


def test_perfetto_tracks_and_slices(tmp_path: Path) -> None:
    write_perfetto([EP8, TP8, EMPTY], tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(processes.values()) == [f"{name} · rank {rank}" for name in ("EP8", "TP8") for rank in range(4)]
    assert len({tid for _, tid in threads} | set(processes)) == len(threads) + len(processes)
    expected = {"attention": "compute", "experts": "compute", "dispatch": "nvlink"}
    tracks = slices_of(events)
    assert sum(map(len, tracks.values())) == 2 * len(EP8.records)
    for key, slices in tracks.items():
        for event in slices:
            assert threads[key] == expected[event["name"]]
            assert event["dur"] >= 0 and event["args"].keys() == {"layer", "phase", "step", "bytes"}
        for before, after in pairwise(slices):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-6
    first = next(event for event in events if event["ph"] == "X" and event["name"] == "experts")
    record = next(record for record in EP8.records if record.name == "experts")
    assert first["ts"] == pytest.approx(record.start_s * 1e6, abs=1e-3)
    assert first["dur"] == pytest.approx((record.finish_s - record.start_s) * 1e6, abs=1.1e-3)


def test_perfetto_flows_join_slices_of_different_tracks() -> None:
    events = trace([EP8, TP8])["traceEvents"]
    tracks = slices_of(events)
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys() and len(starts) == sum(e["ph"] == "s" for e in events) > 0
    into: dict[tuple[int, int, float], int] = defaultdict(int)
    for key, start in starts.items():
        end = ends[key]
        assert start["ts"] < end["ts"]
        assert (start["pid"], start["tid"]) != (end["pid"], end["tid"])
        for event in (start, end):
            slices = tracks[event["pid"], event["tid"]]
            assert sum(s["ts"] <= event["ts"] < s["ts"] + s["dur"] for s in slices) == 1
        into[end["pid"], end["tid"], end["ts"]] += 1
    assert max(into.values()) == MOST_FLOWS_INTO_ONE


def test_perfetto_flows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesim.report.perfetto.MOST_FLOWS", 10)
    whole = trace([EP8, TP8])
    assert sum(event["ph"] == "s" for event in whole["traceEvents"]) == 10
    assert whole["otherData"]["num_flows_left_out"] > 0


def test_perfetto_gives_overlapping_records_their_own_lanes() -> None:
    spans = [(0.0, 3e-6), (1e-6, 2e-6), (2e-6, 4e-6), (3e-6, 5e-6), (5e-6, 5e-6)]
    records = tuple(Record("send", "decode", 0, 0, 0, "link", start, finish, 1.0) for start, finish in spans)
    events = trace([replace(EP8, records=records)])["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert names == ["link", "link (2)"]
    for slices in slices_of(events).values():
        for before, after in pairwise(slices):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-9


def test_perfetto_times_survive_a_reader_that_cuts_digits() -> None:
    spans = [(ns * 1e-9, (ns + 1) * 1e-9) for ns in range(0, 3_000_000, 997)]
    records = tuple(Record("op", "decode", 0, 0, 0, "gpu", start, finish, 0.0) for start, finish in spans)
    events = [e for e in trace([replace(EP8, records=records)])["traceEvents"] if e["ph"] == "X"]
    assert [int(event["ts"] * 1000.0) for event in events] == list(range(0, 3_000_000, 997))


def test_perfetto_compresses_by_suffix_and_takes_no_records(tmp_path: Path) -> None:
    write_perfetto([EMPTY], tmp_path / "t.json.gz")
    assert json.loads(gzip.decompress((tmp_path / "t.json.gz").read_bytes()))["traceEvents"] == []


def test_perfetto_refuses_a_record_that_ends_before_it_starts() -> None:
    record = Record("experts", "decode", 0, 0, 3, "compute", 2.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="'experts' of rank 3"):
        trace([replace(EP8, records=(record,))])


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, moesim.report.html, moesim.report.perfetto; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
