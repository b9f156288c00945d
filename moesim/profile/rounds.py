"""Timing many jobs in shuffled rounds within a budget, so that a disturbance of the machine falls on all of them.

A round runs every job once, in a new order. What is timed is kept after each job, so that an interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Lap(NamedTuple):
    """Seconds of one timing: on the wall, and of this process on the CPU."""

    wall_s: float
    cpu_s: float


def now() -> Lap:
    """Steady clocks: neither is set back by the system's time."""
    return Lap(time.perf_counter(), time.process_time())


def lap_since(start: Lap, clock: Callable[[], Lap] = now) -> Lap:
    """Seconds from `start`, told by the same clock, to now."""
    end = clock()
    return Lap(end.wall_s - start.wall_s, end.cpu_s - start.cpu_s)


@dataclass(frozen=True)
class Job:
    """Something to time.

    Attributes:
        key: its name, unique.
        prepare: called before each timing, untimed, with the number of timings so far; returns what is timed. If that
            returns a `Lap`, this is the timing: what counts is not all of the call, or is timed by the device.
        parts: what a timing is divided by: how many equal pieces of work it does.
        rank: how soon it is dropped when time is short; 0 is never dropped.
        ready: called once, before the first timing; it takes of the budget, but is no part of what a round takes.
    """

    key: str
    prepare: Callable[[int], Callable[[], object]]
    parts: int = 1
    rank: int = 0
    ready: Callable[[], object] = lambda: None


@dataclass
class Samples:
    """Timings by job, kept in a file where one is given.

    Attributes:
        path: JSON lines: a header, then {"key", "wall_s", "cpu_s"}; None to keep nothing.
        header: what the timings rest on; a file with another one is not gone on with.
        laps: job -> its timings, one a round.

    Raises:
        ValueError: the file is of another profile, or damaged.
    """

    path: Path | None = None
    header: Mapping[str, Any] = field(default_factory=dict)
    laps: dict[str, list[Lap]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        if self.path.exists():
            self._read(self.path)
        else:
            self.path.write_text(json.dumps(self.header, sort_keys=True) + "\n")

    def _read(self, path: Path) -> None:
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]  # a killed run may leave half a line
        lines = whole.splitlines()
        try:
            header, *entries = [json.loads(line) for line in lines] or [None]
            if header == json.loads(json.dumps(self.header)):
                for entry in entries:
                    self.laps.setdefault(entry["key"], []).append(Lap(float(entry["wall_s"]), float(entry["cpu_s"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the timings of a profile ({error}); remove it to start anew") from error
        if header != json.loads(json.dumps(self.header)):
            raise ValueError(
                f"{path}: holds timings of another profile: {header}; this one is {dict(self.header)}; give another "
                "folder, or remove the file to start anew"
            )
        if whole != text:
            path.write_text(whole)

    def add(self, key: str, lap: Lap) -> None:
        """Keep one timing."""
        self.laps.setdefault(key, []).append(lap)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, **lap._asdict()}) + "\n")

    def percentiles(self, clock: str, shares: Iterable[float] = (20, 50, 80)) -> dict[str, NDArray[np.float64]]:
        """Percentiles of each job's seconds on `clock`, `wall_s` or `cpu_s`."""
        wanted = list(shares)
        return {key: np.percentile([getattr(x, clock) for x in laps], wanted) for key, laps in self.laps.items()}


class Timing(NamedTuple):
    """Whole rounds timed in all, the jobs dropped for want of time, seconds taken, and why other jobs failed."""

    rounds: int
    dropped: tuple[str, ...]
    wall_s: float
    failed: Mapping[str, str] = {}


class Tried(NamedTuple):
    """One timing, and the seconds that it took with its preparation."""

    lap: Lap
    cost_s: float


def time_rounds(
    jobs: Iterable[Job],
    samples: Samples,
    budget_s: float,
    *,
    seed: int = 0,
    min_rounds: int = 3,
    max_rounds: int = 25,
    clock: Callable[[], Lap] = now,
    report: Callable[[float], None] = lambda share: None,
    survived: tuple[type[Exception], ...] = (),
) -> Timing:
    """Warm every job up once, drop those that do not fit the budget, and time the others in shuffled rounds.

    Args:
        jobs: what to time.
        samples: takes the timings; jobs that have more of them already are left out of rounds until all have as many.
        budget_s: seconds on the wall for everything. Jobs are dropped, those of the highest rank first, until
            `min_rounds` rounds fit; the first round is always finished, a later one ends with the budget.
        seed: of the order.
        min_rounds, max_rounds: rounds that must fit, and that are enough.
        report: told the share of the budget that is used.
        survived: errors that end the job that raises them, not the others.

    Raises:
        ValueError: two jobs have the same key.
    """
    begun = clock().wall_s

    def used_s() -> float:
        return clock().wall_s - begun

    failed: dict[str, str] = {}

    def tried(job: Job, turn: int, first: bool = False) -> Tried | None:
        try:
            if first:
                job.ready()
            before = clock()
            timed = job.prepare(turn)
            start = clock()
            told = timed()
            lap = told if isinstance(told, Lap) else lap_since(start, clock)
            return Tried(lap, clock().wall_s - before.wall_s)
        except survived as error:
            failed[job.key] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            return None

    kept, dropped = _warm(list(jobs), samples, budget_s, min_rounds, max_rounds, clock, report, tried)
    done = min((len(samples.laps.get(job.key, ())) for job in kept), default=0)
    for turn in range(done, max_rounds):
        order = [job for job in kept if job.key not in failed and len(samples.laps.get(job.key, ())) <= turn]
        random.Random(f"{seed}/{turn}").shuffle(order)
        for job in order:
            if turn and used_s() > budget_s:
                return Timing(turn, tuple(dropped), used_s(), failed)
            found = tried(job, turn)
            if found is not None:
                samples.add(job.key, Lap(found.lap.wall_s / job.parts, found.lap.cpu_s / job.parts))
            report(min(1.0, used_s() / budget_s))
        done = turn + 1
    return Timing(done, tuple(dropped), used_s(), failed)


def _warm(
    jobs: list[Job],
    samples: Samples,
    budget_s: float,
    min_rounds: int,
    max_rounds: int,
    clock: Callable[[], Lap],
    report: Callable[[float], None],
    tried: Callable[[Job, int, bool], Tried | None],
) -> tuple[list[Job], list[str]]:
    """The jobs that fit, and the names of those that do not."""
    if len({job.key for job in jobs}) < len(jobs):
        raise ValueError("jobs to time must have different keys; two are alike")
    begun = clock().wall_s
    cost_s: dict[str, float] = {}
    dropped: list[str] = []
    for job in sorted(jobs, key=lambda job: job.rank):
        if len(samples.laps.get(job.key, ())) >= max_rounds:  # nothing left to time
            cost_s[job.key] = 0.0
            continue
        left_s = budget_s - (clock().wall_s - begun)
        if job.rank and min_rounds * sum(cost_s.values()) >= left_s:
            dropped.append(job.key)
            continue
        found = tried(job, 0, True)
        if found is None:
            continue
        cost_s[job.key] = found.cost_s
        report(min(1.0, (clock().wall_s - begun) / budget_s))
        if job.rank and min_rounds * sum(cost_s.values()) > budget_s - (clock().wall_s - begun):
            del cost_s[job.key]
            dropped.append(job.key)
    return [job for job in jobs if job.key in cost_s], dropped
