"""What a serving run tells: tables, the page, the table of requests, and the command line around them."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from serving_cases import queue, small_service

from moesim.cli.services import check_options, run_services
from moesim.fleet import Fleet, Slo
from moesim.report.request_table import COLUMNS, request_table, write_requests
from moesim.report.serving_page import serving_answer, serving_page
from moesim.report.serving_tables import serving_sections
from moesim.report.tables import result_tables
from moesim.serving.metrics import ALL, Window, latencies
from moesim.serving.runs import run_at_highest_rate, run_service

SLO = Slo(ttft_s=0.5, tpot_s=0.02)
EVIL = '<b>"bold"</b> & $x_1$'


@pytest.fixture(scope="module")
def pair():
    """Two set-ups: a faster one and one of which the second half was not run."""
    fast = run_service(small_service(3.0, 80, slo=SLO, fleet=Fleet(usd_per_device_hour=2.0), name="fast"), queue)
    service = small_service(5.0, 80, slo=SLO, name=EVIL)
    slow = run_service(service, lambda s, bound: queue(s, bound, token_s=9e-3, until_s=10.0))
    return [fast, slow]


def shown(results, width=100):
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        for table in result_tables(results, width, serving_sections(results)):
            console.print(table)
    return capture.get()


class Checker(HTMLParser):
    """Collects ids and tags, and insists that every tag is closed in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("width", [72, 80, 120])
def test_tables_fit_the_terminal_and_name_every_set_up(pair, width):
    text = shown(pair, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "fast" in text
    assert EVIL in text
    for words in ("TTFT mean", "Goodput, requests/s", "Cost, 1 M output tokens", "Where a serving", "PARTIAL"):
        assert words in text


def test_one_set_up_has_its_latencies_in_columns(pair):
    section = serving_sections(pair[:1])[0]
    assert section.setups == ("mean", "p50", "p90", "p99")
    assert [row.label for row in section.rows] == ["TTFT", "TPOT", "ITL", "E2E", "Queueing"]
    assert all(len(line) <= 80 for line in shown(pair[:1], 80).splitlines())


def test_the_best_of_a_row_is_marked_by_its_kind(pair):
    rows = {row.label: row for section in serving_sections(pair) for row in section.rows}
    assert [cell.best for cell in rows["TPOT mean"].cells] == [True, False]  # less is better
    more = [result.metrics["output_tokens_per_s"] for result in pair]
    assert [cell.best for cell in rows["Output tokens/s"].cells] == [value == max(more) for value in more]


def test_the_page_is_whole_alone_and_the_same_each_time(pair):
    page = serving_page(pair)
    assert page == serving_page(pair)
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert len(checker.ids) == len(set(checker.ids))
    assert "script" not in checker.tags
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert "<b>&quot;" not in page.replace("<b>fast", "")
    assert EVIL not in page
    for title in ("Latencies", "Over time", "Time to first token by length of the prompt", "Throughput and cost"):
        assert f"<h2>{title}</h2>" in page
    assert "<h2>Search for the maximum rate</h2>" not in page


def test_the_page_of_a_search_shows_its_rates():
    result = run_at_highest_rate(small_service(2.0, 60, slo=SLO, name="one"), queue)
    page = serving_page([result])
    assert "<h2>Search for the maximum rate</h2>" in page
    assert result.search.says in serving_answer([result])
    for item in result.search.tried:
        assert f"{item.rate_per_s:.4g} requests/s" in page


def test_the_answer_says_what_is_partial_best_and_costs(pair):
    answer = serving_answer(pair)
    assert answer.startswith(f"PARTIAL: {EVIL} was stopped")
    assert "fast has the best share of requests within the SLO" in answer
    assert "A million output tokens cost" in answer


def test_a_run_that_nobody_asked_anything_of_still_has_a_page():
    result = run_service(small_service(num=3), lambda s, bound: queue(s, bound, until_s=1e-9))
    assert "PARTIAL" in serving_page([result])


def test_every_request_is_a_row_with_what_the_outcome_has(pair, tmp_path):
    write_requests(pair, tmp_path / "r.parquet")
    write_requests(pair, tmp_path / "r.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "r.parquet"]
    table = pq.read_table(tmp_path / "r.parquet")
    assert table.equals(request_table(pair))
    assert table.column_names == list(COLUMNS)
    assert all(field.metadata[b"meaning"] for field in table.schema)
    outcome = pair[0].outcome
    ttft_s = table["ttft_s"].to_numpy()[:80]
    np.testing.assert_allclose(ttft_s, latencies(outcome)["ttft"])
    assert table["finish_s"].null_count == np.isnan(pair[1].outcome.finish_s_Q).sum() > 0
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 160
    assert {row["setup"] for row in rows} == {"fast", EVIL}
    assert rows[-1]["finish_s"] == ""
    assert float(rows[3]["e2e_s"]) == pytest.approx(latencies(outcome)["e2e"][3])


def test_only_known_formats_and_folders_are_written(pair, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.csv or \.parquet"):
        write_requests(pair, tmp_path / "r.txt")
    with pytest.raises(ValueError, match="there is no folder"):
        write_requests(pair, tmp_path / "no" / "r.csv")


@pytest.fixture
def command(capsys):
    """What `moesim run` does with two made-up services, with the queue as its engine."""
    services = [small_service(3.0, 60, slo=SLO, name="one"), small_service(3.0, 60, seed=1, slo=SLO, name="two")]

    def invoke(until_s=np.inf, as_json=False, report=None, requests=None, find=None, window=ALL):
        def engine(service, bound, tell):
            tell(len(service.requests), 1.0)
            return queue(service, bound, until_s=until_s)

        check_options(report, requests, find, window)
        code = run_services(services, engine, as_json, report, requests, find, window)
        said = capsys.readouterr()
        return SimpleNamespace(exit_code=code, stdout=said.out, stderr=said.err)

    return invoke


def test_json_has_the_shape_of_every_run(command):
    once, again = command(as_json=True), command(as_json=True)
    assert once.exit_code == 0
    assert once.stdout == again.stdout
    shape = json.loads(once.stdout)
    assert {"scenario", "engine", "seed", "version", "metrics", "intervals", "provenance", "beside"} <= shape.keys()
    assert shape["is_partial"] is False
    assert set(shape["beside"]) == {"two"}
    assert set(shape["provenance"]) == {f"{s}_fraction" for s in ("measured", "fitted", "datasheet", "assumed")}
    assert all(a < b for a, b in pairwise(shape["timeline"]["time_s"]))
    assert all(low <= shape["metrics"][name] <= high for name, (low, high) in shape["intervals"].items())


def test_files_are_written_and_named_on_stderr(command, tmp_path):
    result = command(report=tmp_path / "r.html", requests=tmp_path / "q.csv")
    assert result.exit_code == 0
    assert "TTFT mean" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.csv", "r.html"]
    assert f"requests: {tmp_path / 'q.csv'}" in result.stderr


def test_find_rate_prints_every_rate_and_the_answer(command):
    result = command(find="rate", as_json=True)
    assert result.exit_code == 0
    shape = json.loads(result.stdout)
    for found in (shape, shape["beside"]["two"]):
        assert found["search"]["rate_per_s"] == found["metrics"]["max_requests_per_s"]
        for item in found["search"]["tried"]:
            assert f"{item['rate_per_s']:.4g} requests/s" in result.stderr
    assert "requests/s keep the SLO" in command(find="rate").stdout


def test_an_interrupted_run_is_printed_and_exits_130(command):
    result = command(2.0)
    assert result.exit_code == 130
    assert "PARTIAL RESULT of one" in result.stdout
    assert "not run: two" in result.stderr
    assert json.loads(command(2.0, as_json=True).stdout)["is_partial"] is True


@pytest.mark.parametrize(
    ("options", "says"),
    [({"requests": Path("r.txt")}, r"must end in \.csv"), ({"report": Path("no/r.html")}, "there is no folder"),
     ({"find": "rate", "window": Window(1.0)}, "judges all requests"), ({"window": Window(1e9)}, "measure_from_s")],
)  # fmt: skip
def test_wrong_options_are_one_clear_error(command, options, says):
    with pytest.raises(ValueError, match=says):
        command(**options)
