"""Rounds on a clock that only the jobs move: what fits, what is dropped, what is kept and not repeated."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.profile.rounds import Job, Lap, Samples, now, time_rounds


class Clock:
    """Seconds that pass when a job says so; half of them on the CPU."""

    def __init__(self) -> None:
        self.s = 0.0
        self.order: list[str] = []

    def __call__(self) -> Lap:
        return Lap(self.s, self.s / 2)

    def job(self, key: str, seconds: float, rank: int = 0, parts: int = 1, prepare_s: float = 0.0) -> Job:
        def prepare(_turn):
            self.s += prepare_s

            def run():
                self.order.append(key)
                self.s += seconds

            return run

        return Job(key, prepare, parts, rank)


def test_a_timing_is_divided_by_its_parts_and_leaves_preparing_out():
    clock, samples = Clock(), Samples()
    time_rounds([clock.job("a", 6.0, parts=3, prepare_s=5.0)], samples, 100, clock=clock, max_rounds=4)
    assert samples.laps == {"a": [Lap(2.0, 1.0)] * 4}


def test_a_job_may_tell_its_own_time():
    samples = Samples()
    time_rounds([Job("a", lambda _turn: lambda: Lap(3.0, 2.0), parts=2)], samples, 1, max_rounds=2)
    assert samples.laps["a"] == [Lap(1.5, 1.0)] * 2


def test_every_round_times_all_in_another_order_that_the_seed_decides():
    def order(seed):
        clock = Clock()
        time_rounds([clock.job(str(i), 1.0) for i in range(8)], Samples(), 1e9, seed=seed, clock=clock, max_rounds=3)
        return [clock.order[i : i + 8] for i in range(8, 32, 8)]  # the first 8 warm up

    rounds = order(1)
    assert all(sorted(one) == sorted(rounds[0]) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert rounds == order(1) != order(2)


def test_the_highest_ranks_are_dropped_until_three_rounds_fit():
    clock = Clock()
    jobs = [clock.job("fine", 10.0, rank=2), clock.job("core", 10.0, rank=1), clock.job("needed", 10.0)]
    timing = time_rounds(jobs, Samples(), 100.0, clock=clock)
    assert timing.dropped == ("fine",)
    assert timing.rounds >= 3
    assert timing.wall_s <= 110.0
    clock = Clock()
    timing = time_rounds([clock.job("needed", 60.0)], Samples(), 100.0, clock=clock)
    assert timing == (1, (), 120.0, {})  # never less than a round


@given(st.lists(st.tuples(st.floats(0.01, 5.0), st.integers(0, 3)), min_size=1, max_size=12), st.floats(1.0, 200.0))
def test_the_budget_holds_but_for_jobs_that_are_never_dropped(kinds, budget_s):
    clock, samples = Clock(), Samples()
    jobs = [clock.job(str(i), seconds, rank) for i, (seconds, rank) in enumerate(kinds)]
    timing = time_rounds(jobs, samples, budget_s, clock=clock)
    needed_s = sum(seconds for seconds, rank in kinds if not rank)
    longest_s = max(seconds for seconds, _ in kinds)
    assert timing.wall_s <= max(budget_s, 2 * needed_s) + 2 * longest_s + 1e-9
    assert set(samples.laps) == {job.key for job in jobs} - set(timing.dropped)
    assert all(jobs[int(key)].rank for key in timing.dropped)
    assert {len(laps) for laps in samples.laps.values()} <= {timing.rounds, timing.rounds + 1}


def test_two_jobs_of_one_name_are_refused():
    with pytest.raises(ValueError, match="different keys"):
        time_rounds([Clock().job("a", 1.0), Clock().job("a", 1.0)], Samples(), 1.0)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    path, header = tmp_path / "samples.jsonl", {"seed": 3}
    clock, left = Clock(), [17]

    def stopping(job):
        def prepare(turn):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return job.prepare(turn)

        return Job(job.key, prepare)

    jobs = [clock.job(str(i), 1.0 + i) for i in range(5)]
    with pytest.raises(KeyboardInterrupt):
        time_rounds([stopping(job) for job in jobs], Samples(path, header), 1e9, clock=clock, max_rounds=4)
    kept = Samples(path, header)
    assert sum(map(len, kept.laps.values())) == 12  # 17 less 5 that warmed up
    before = len(clock.order)
    time_rounds(jobs, kept, 1e9, clock=clock, max_rounds=4)
    assert len(clock.order) - before == 5 + 8
    assert {key: [lap.wall_s for lap in laps] for key, laps in Samples(path, header).laps.items()} == {
        str(i): [1.0 + i] * 4 for i in range(5)
    }
    before = len(clock.order)
    time_rounds(jobs, Samples(path, header), 1e9, clock=clock, max_rounds=4)
    assert len(clock.order) == before  # all is done


def test_a_half_written_line_is_left_out(tmp_path):
    path = tmp_path / "samples.jsonl"
    Samples(path, {}).add("a", Lap(1.0, 2.0))
    with path.open("a") as file:
        file.write('{"key": "a", "wa')
    again = Samples(path, {})
    again.add("a", Lap(3.0, 4.0))
    assert Samples(path, {}).laps == {"a": [Lap(1.0, 2.0), Lap(3.0, 4.0)]}


@pytest.mark.parametrize(
    ("text", "rule"),
    [('{"seed": 4}\n', "another profile"), ("not json\n", "not the timings"), ('{"seed": 3}\n{"key": 1}\n', "wall_s")],
)
def test_files_of_others_and_damaged_ones_are_refused(tmp_path, text, rule):
    path = tmp_path / "samples.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=rule) as error:
        Samples(path, {"seed": 3})
    assert str(path) in str(error.value)


def test_percentiles_are_of_each_clock():
    samples = Samples(laps={"a": [Lap(float(i), 10.0 * i) for i in range(1, 6)]})
    assert samples.percentiles("wall_s")["a"].tolist() == pytest.approx([1.8, 3.0, 4.2])
    assert samples.percentiles("cpu_s", (50,))["a"].tolist() == [30.0]


def test_the_real_clock_moves_forward_on_both():
    start = now()
    total = sum(range(200_000))
    end = now()
    assert total and end.wall_s > start.wall_s and end.cpu_s > start.cpu_s


def test_the_file_is_plain_lines(tmp_path):
    Samples(tmp_path / "s.jsonl", {"b": 1, "a": (2, 3)}).add("k", Lap(0.5, 0.25))
    assert [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()] == [
        {"a": [2, 3], "b": 1},
        {"key": "k", "wall_s": 0.5, "cpu_s": 0.25},
    ]
