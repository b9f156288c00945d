"""Studies: rules of a verdict, the shape of the answer, bad names, and that no verdict changes unseen."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from moesim.cli import cli, main
from moesim.study import VERDICTS, Claim, Study, load_studies, run_study, studies_json, study_names

STUDIES = load_studies(study_names())


def claim(paper=10.0, ours=10.0, **more):
    return Claim("it is so", "table 1", paper, ours, **{"tolerance": 0.1, **more})


# A verdict


@pytest.mark.parametrize(
    ("ours", "verdict"), [(9.01, "agrees"), (10.99, "agrees"), (8.99, "differs"), (11.01, "differs")]
)
def test_a_number_agrees_within_its_tolerance(ours, verdict):
    assert claim(ours=ours).verdict == verdict
    assert claim(-10.0, -ours).verdict == verdict


@pytest.mark.parametrize(
    ("paper", "inside", "outside"),
    [("> 1", 1.01, 1.0), (">= 1.5", 1.5, 1.49), ("< 2e-3", 1.9e-3, 2e-3), ("<= 2", 2.0, 2.01), ("1 to 2", 2.0, 2.01),
     ("-2 to -1", -1.5, -0.9)],
)  # fmt: skip
def test_a_bound_holds_or_not(paper, inside, outside):
    assert claim(paper, inside, tolerance=0.0).verdict == "agrees"
    assert claim(paper, outside, tolerance=0.0).verdict == "differs"
    assert claim(paper, outside, tolerance=0.2).verdict == "agrees"  # loosened


def test_what_is_fitted_or_not_at_hand_shows_nothing():
    assert claim(fitted="a start of 3 us").verdict == "untestable"
    assert "3 us" in claim(fitted="a start of 3 us").reason
    assert claim(None).verdict == "untestable"
    assert claim(None).reason == "the paper's value is not at hand"
    assert claim(ours=None, because="no gates").verdict == "untestable"
    assert not any(c.has_changed for c in (claim(None), claim(fitted="x"), claim(ours=None, because="no gates")))


@pytest.mark.parametrize(
    ("ours", "because", "committed", "changed"),
    [(10, "", "agrees", False), (20, "", "agrees", True), (20, "a reason", "differs", False),
     (10, "a reason", "differs", True)],
)  # fmt: skip
def test_a_reason_commits_a_difference_and_changes_are_seen_both_ways(ours, because, committed, changed):
    found = claim(ours=ours, because=because)
    assert (found.committed, found.has_changed) == (committed, changed)
    assert (f"the committed verdict is {committed}" in found.reason) == changed


@pytest.mark.parametrize("paper", ["1", "about 1", "> x", "=> 1", "1 to", "> 1 x"])
def test_a_bound_that_cannot_be_read_is_refused(paper):
    with pytest.raises(ValueError, match="paper must be a number, '> 1'"):
        claim(paper)


def test_a_number_needs_a_tolerance_and_nothing_needs_a_reason():
    with pytest.raises(ValueError, match="tolerance above 0"):
        claim(tolerance=0.0)
    with pytest.raises(ValueError, match="no reason"):
        claim(ours=None)


# Pages and names


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_page_says_what_is_asked_and_what_is_not(study):
    for text in (study.title, study.question, study.setting, study.lever, study.expected, study.silent_on):
        assert len(text) > 20 and "\n" not in text


def test_names_that_there_are_not_are_told_all_at_once():
    with pytest.raises(ValueError, match=r"'hetumo'.*nearest: 'hetumoe'.*'xyz'"):
        load_studies(["hetumo", "hetumoe", "xyz"])


def made_up(monkeypatch, *claims):
    monkeypatch.setitem(sys.modules, "moesim.studies.made_up", SimpleNamespace(claims=lambda: list(claims)))
    return Study("made_up", *["words"] * 6)


def test_claims_have_words_of_their_own(monkeypatch):
    with pytest.raises(ValueError, match="says 'it is so' twice"):
        run_study(made_up(monkeypatch, claim(), claim(ours=9.9)))
    with pytest.raises(ValueError, match="claims nothing"):
        run_study(made_up(monkeypatch))


def test_a_study_that_breaks_is_no_wrong_input(monkeypatch):
    def claims():
        raise ValueError("a rank too many")

    monkeypatch.setitem(sys.modules, "moesim.studies.made_up", SimpleNamespace(claims=claims))
    with pytest.raises(RuntimeError, match="study 'made_up' broke: a rank too many"):
        run_study(Study("made_up", *["words"] * 6))


def test_the_shape_of_the_answer(monkeypatch):
    claims = claim(), Claim("other", "", "> 1", 0.5), Claim("third", "", None, 3.0, "s", fitted="")
    shape = json.loads(json.dumps(studies_json([run_study(made_up(monkeypatch, *claims))])))
    assert shape["totals"] == {"claims": 3, "agrees": 1, "differs": 1, "untestable": 1, "changed": 1}
    (study,) = shape["studies"]
    assert {"name", "lever", "seconds", "claims"} <= set(study)
    for found in study["claims"]:
        assert {"says", "where", "paper", "ours", "tolerance", "fitted", "verdict", "because"} <= set(found)
        assert found["verdict"] in VERDICTS and isinstance(found["fitted"], bool)


# The command


def test_the_command_lists_and_runs(monkeypatch):
    listed = CliRunner().invoke(cli, ["study", "list"])
    assert listed.exit_code == 0 and all(study.name in listed.output for study in STUDIES)
    found = CliRunner().invoke(cli, ["study", "run", "hetumoe"])
    assert found.exit_code == 0
    assert "1 of 1" in found.stderr and "1 of 1" not in found.stdout
    assert re.search(r"leaders against flat, 8 x 8 GPUs .*2\.00 . +\d\.\d+ . .*differs", found.stdout)
    shape = json.loads(CliRunner().invoke(cli, ["study", "run", "hetumoe", "--json"]).stdout)
    assert f"{shape['totals']['agrees']} agrees" in found.stdout


def test_a_changed_verdict_ends_with_1(monkeypatch):
    import moesim.studies.hetumoe as study

    for changed in (claim(ours=20.0), claim(because="so it was")):
        monkeypatch.setattr(study, "claims", lambda changed=changed: [changed])
        found = CliRunner().invoke(cli, ["study", "run", "hetumoe"])
        assert found.exit_code == 1
        assert "committed" in found.stdout and "verdicts that are not the committed ones: 1" in found.stderr


@pytest.mark.parametrize("asked", [["hetumo"], [], ["hetumoe", "--all"]])
def test_wrong_names_end_with_2(monkeypatch, capsys, asked):
    monkeypatch.setattr(sys, "argv", ["moesim", "study", "run", *asked])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


# The report card


@pytest.mark.parametrize(
    "study",
    [pytest.param(study, id=study.name, marks=[pytest.mark.slow] if study.slow else []) for study in STUDIES],
)
def test_verdicts_are_the_committed_ones(study):
    judged = run_study(study)
    assert any(c.is_testable for c in judged.claims) or all("not beside the project" in c.reason for c in judged.claims)
    assert [(c.says, c.verdict, c.ours) for c in judged.claims if c.has_changed] == []
