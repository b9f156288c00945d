"""Acceptance lengths: the file's shape, what chances they stand for, and the published curves."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.files.acceptance import chances_by_position, constant_rate, read_acceptance

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "speculative_acceptance"

lengths = st.integers(1, 12).flatmap(lambda k: st.tuples(st.floats(1, k + 1), st.just(k)))


@given(lengths)
def test_chances_have_the_mean_and_only_one_is_uncertain(case):
    length, drafts = case
    chances = chances_by_position(length, drafts)
    survives, mean = 1.0, 1.0
    for chance in chances:
        survives *= chance
        mean += survives
    assert len(chances) == drafts
    assert mean == pytest.approx(length, abs=1e-9)
    assert sum(0 < chance < 1 for chance in chances) <= 1


@given(lengths)
def test_constant_rate_has_the_mean(case):
    length, drafts = case
    rate = constant_rate(length, drafts)
    assert 0 <= rate <= 1
    assert sum(rate**i for i in range(drafts + 1)) == pytest.approx(length, abs=1e-9)


@pytest.mark.parametrize(("length", "drafts"), [(0.9, 1), (2.1, 1), (float("nan"), 3), (1.5, 0)])
def test_lengths_that_cannot_be(length, drafts):
    for function in (chances_by_position, constant_rate):
        with pytest.raises(ValueError, match="acceptance_length must be from 1"):
            function(length, drafts)


def write(tmp_path, text):
    path = tmp_path / "curves.yaml"
    path.write_text(text)
    return path


def test_a_file_and_what_is_found_in_it(tmp_path):
    curves = read_acceptance(write(tmp_path, "# head\nm-1:\n  on:\n    1: 1.5 # note\n    3: 2\n  off:\n    1: 1.25\n"))
    assert curves.length == {("m-1", "on", 1): 1.5, ("m-1", "on", 3): 2.0, ("m-1", "off", 1): 1.25}
    assert curves.find(3, "on") == 2.0
    for args, words in [
        ((2, "on"), "it has 1, 3"),
        ((1, "onn"), "nearest: 'on'"),
        ((1,), "several"),
        ((1, "on", "x"), "x"),
    ]:
        with pytest.raises(ValueError, match=words):
            curves.find(*args)


def test_all_mistakes_at_once(tmp_path):
    text = "m:\n  on:\n    1: 2.5\n    0: 1\n    2: two\n    2: 2\n    2: 2\n   3: 1\n- x\n  off: 3\n"
    with pytest.raises(ValueError) as error:
        read_acceptance(write(tmp_path, text))
    for words in ("line 3", "line 4", "line 5", "line 7", "twice", "line 8", "line 9", "line 10"):
        assert words in str(error.value)
    assert "line 6" not in str(error.value)


@pytest.mark.parametrize("text", ["", "# only words\n", "m:\n"])
def test_nothing_in_it(tmp_path, text):
    with pytest.raises(ValueError, match="no acceptance length"):
        read_acceptance(write(tmp_path, text))


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_acceptance(tmp_path / "none.yaml")


@pytest.mark.skipif(not DATA.exists(), reason="no published acceptance curves beside the checkout")
def test_published_curves_are_read_whole():
    files = sorted(DATA.glob("*.yaml"))
    assert files
    for file in files:
        curves = read_acceptance(file)
        cells = [line for line in file.read_text().splitlines() if line.startswith("    ")]
        assert len(curves.length) == len(cells)
        for (_, _, drafts), length in curves.length.items():
            assert 0 < constant_rate(length, drafts) < 1
    assert read_acceptance(DATA / "dsv4_mtp.yaml").find(3, "thinking_off") == 2.97
