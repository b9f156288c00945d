"""`moesim trace stats`: tables, JSON and the page say what was measured, whatever the trace lacks."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from routing_cases import gpt_oss, random_trace

from moesim.cli import cli
from moesim.files.traces import write_trace
from moesim.report.routing import HEADINGS, Measured, described, notes, routing_json, routing_sections
from moesim.report.routing_page import routing_page
from moesim.report.tables import NONE
from moesim.routing.statistics import statistics


def measured_of(trace, ep=(2, 4), batches=(1, 2, 3)):
    return Measured(trace, statistics(trace, ep=ep, batches=batches), ep, batches)


def invoke(*args):
    return CliRunner().invoke(cli, ["trace", "stats", *map(str, args)])


def has_nan(text):
    return re.search(r"\bnan\b", re.sub(r"<[^>]*>", " ", text).lower()) is not None


@pytest.fixture
def path(tmp_path):
    write_trace(replace(random_trace(0), origin="random"), tmp_path / "t.parquet")
    return tmp_path / "t.parquet"


def test_every_measure_has_a_heading_and_a_label_of_its_own():
    names = [n for n in measured_of(random_trace(0, layers=4)).measures if not re.search("_by_(chance|popularity)$", n)]
    assert {described(name)[0] for name in names} == set(HEADINGS)
    assert len({described(name) for name in names}) == len(names)
    with pytest.raises(KeyError):
        described("load")


def test_a_row_is_mean_least_most_and_what_stands_beside():
    measured = measured_of(random_trace(0))
    rows = {row.label: row for section in routing_sections(measured) for row in section.rows}
    values, beside = (measured.measures[f"top1_repeat_rate{end}"] for end in ("", "_by_chance"))
    expected = [values.mean(), values.min(), values.max(), beside.mean()]
    assert [cell.text for cell in rows["top-1 repeats"].cells] == [f"{100 * value:.1f} %" for value in expected]
    assert [cell.text for cell in rows["topics (groups of requests)"].cells][1:] == [NONE] * 3


def test_json_is_complete_and_valid(path):
    result = invoke(path, "--json", "--ep", 2, "--batch", 2, "--batch", 9)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["trace"]["num_requests"] == 4 and found["trace"]["origin"] == "random"
    assert found["measures"]["num_distinct_experts_batch_9"] == [None] * 3
    assert found["measures"]["rank_imbalance_ratio_ep_2_batch_9"] == [None] * 3
    assert found["num_batches"]["9"] == 0 < found["num_batches"]["2"]
    assert any("no batch of 9: the trace has 4 requests" in note for note in found["notes"])
    assert set(found["miss_ratio_curves"]) == {"requests_in_turn", "batch_2"}
    lru = np.array(found["miss_ratio_curves"]["requests_in_turn"]["lru"])
    assert lru.shape == (3, 9) and (lru[:, 0] == 1).all()
    assert 1 - lru[:, 2] == pytest.approx(found["measures"]["lru_hit_ratio_2_experts"])


def test_table_and_notes(path):
    result = invoke(path)
    assert result.exit_code == 0
    for heading in HEADINGS:
        assert heading in result.stdout
    assert "router random" in result.stdout
    assert "note: the router of this trace is random, not trained" in result.stderr
    assert not has_nan(result.stdout)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--ep", 3], "ep 3: .*must divide the 8 experts.*1, 2, 4, 8 would do"),
        (["--batch", 0], "at least 1 request; given 0"),
        (["--report", "no/such/folder/r.html"], "there is no folder"),
    ],
)
def test_wrong_input_is_one_message(path, args, says):
    result = invoke(path, *args)
    assert isinstance(result.exception, ValueError)
    assert re.search(says, str(result.exception))


def test_no_such_trace():
    assert "no trace 'olmo'" in str(invoke("olmo").exception)


PICTURES = (
    "Load of the experts", "Load of the ranks", "Distinct experts in a batch", "From token to token",
    "Expert cache: misses by size", "From layer to layer", "Where the tokens of an expert go next",
    "Which experts are chosen together", "Prediction of later layers", "Topics and drift",
)  # fmt: skip


def test_the_page_stands_alone_and_is_the_same_twice(path, tmp_path):
    pages = []
    for name in ("a.html", "b.html"):
        assert invoke(path, "--report", tmp_path / name).exit_code == 0
        pages.append((tmp_path / name).read_text())
    assert pages[0] == pages[1]
    for title in PICTURES:
        assert f'aria-label="{title}"' in pages[0]
    assert not re.findall(r'(?:src|href)="(?!#|data:)', pages[0])
    assert "<script" not in pages[0] and not has_nan(pages[0])
    ids = re.findall(r'\bid="([^"]*)"', pages[0])
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "shape",
    [
        {"requests": 1, "tokens": 3, "predicted": False},
        {"experts": 2, "top_k": 2, "requests": 2},
        {"tokens": 1, "layers": 1, "top_k": 1, "experts": 1, "requests": 1, "predicted": False},
    ],
)
def test_traces_that_lack_things_still_have_a_page(shape):
    trace = random_trace(0, **shape)
    measured = measured_of(replace(trace, token_id_T=None), ep=(1,))
    page = routing_page(measured)
    assert "Load of the experts" in page and not has_nan(page)
    assert any("no token ids" in note for note in notes(measured))
    assert routing_sections(measured)
    json.dumps(routing_json(measured), allow_nan=False)


@pytest.mark.slow
def test_a_real_trace_takes_seconds():
    measured = measured_of(gpt_oss(), ep=(8, 32), batches=(1, 4, 16, 64))
    assert "178 requests" in routing_page(measured)
