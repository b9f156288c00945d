"""Operators on one CUDA device as jobs, timed by device events. Written without such a device: it has not been run.

Torch's own operators (matrix product, scaled dot-product attention, grouped matrix product) and the Triton kernels
beside them, each with the fastest of its candidate tiles; copies to and from host memory, pinned and pageable, alone
and while another stream copies the other way; and what a launch costs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moesim.profile.cuda_calls import Calls
from moesim.profile.machine import write_whole
from moesim.profile.rounds import Job, Lap, lap_since, now
from moesim.profile.shapes import Cell

REPEATS, TRIES, LAUNCHES = 10, 3, 200
FLUSH_BYTES = 256 << 20
SLEEP_CYCLES = 2_000_000
"""About a millisecond in which the device waits, so that the host has launched all of a call before it starts."""
_CUDA: Any = torch.cuda


@dataclass(frozen=True)
class Bench:
    """Where calls run, and what tells their time.

    Attributes:
        device: of the tensors, "cuda" or "cpu".
        seconds: mean seconds of a number of calls.
        wait: until the device has nothing to do.
    """

    device: str
    seconds: Callable[[Callable[[], object], int], float]
    wait: Callable[[], object]


def event_bench() -> Bench:
    """The CUDA device: calls start with cold caches and are timed by events in their stream."""
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(call: Callable[[], object], repeats: int) -> float:
        total_ms = 0.0
        for _ in range(repeats):
            flushed.zero_()
            start, end = _CUDA.Event(enable_timing=True), _CUDA.Event(enable_timing=True)
            _CUDA._sleep(SLEEP_CYCLES)
            start.record()
            call()
            end.record()
            _CUDA.synchronize()
            total_ms += start.elapsed_time(end)
        return total_ms * 1e-3 / repeats

    return Bench("cuda", seconds, _CUDA.synchronize)


@dataclass
class Tiles:
    """The fastest candidate of each cell, in words, kept in a file where one is given.

    Raises:
        ValueError: the file is damaged.
    """

    path: Path | None = None
    words: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            try:
                self.words |= json.loads(self.path.read_text())
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.path}: not tiles by cell ({error}); remove it to choose them anew") from error

    def keep(self, key: str, word: str) -> None:
        """Note a choice."""
        self.words[key] = word
        if self.path is not None:
            write_whole(json.dumps(self.words, indent=1) + "\n", self.path)


def cuda_jobs(cells: Sequence[Cell], bench: Bench, tiles: Tiles, seed: int) -> list[Job]:
    """The cells' jobs; both clocks of a timing are the bench's."""
    torch.manual_seed(seed)
    calls = Calls(bench.device)

    def job(cell: Cell) -> Job:
        def ready() -> None:
            if cell.op != "launch":
                _fastest(cell.key, calls.of(cell), bench, tiles)

        def prepare(_turn: int) -> Callable[[], Lap]:
            if cell.op == "launch":
                return lambda: _launches(bench)
            call = _fastest(cell.key, calls.of(cell), bench, tiles)
            call()  # warms up
            bench.wait()

            def timed() -> Lap:
                seconds = bench.seconds(call, REPEATS)
                return Lap(seconds, seconds)

            return timed

        return Job(cell.key, prepare, rank=cell.rank, ready=ready)

    return [job(cell) for cell in cells]


def _fastest(
    key: str, candidates: Mapping[str, Callable[[], object]], bench: Bench, tiles: Tiles
) -> Callable[[], object]:
    """The one that was chosen before, the only one, or the quickest in a few timings; those that fail are passed over.

    Raises:
        RuntimeError: all fail.
    """
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    if tiles.words.get(key) in candidates:
        return candidates[tiles.words[key]]
    found: dict[str, float] = {}
    errors = []
    for word, call in candidates.items():
        try:
            call()  # compiles
            bench.wait()
            found[word] = bench.seconds(call, TRIES)
        except Exception as error:  # the compiler's and the driver's errors are of many kinds
            errors.append(f"{word}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    if not found:
        raise RuntimeError(f"every candidate failed: {'; '.join(errors)}")
    tiles.keep(key, min(found, key=lambda word: found[word]))
    return candidates[tiles.words[key]]


def _launches(bench: Bench) -> Lap:
    """Seconds of one of many small operators in a row, which the host cannot launch faster."""
    small = torch.zeros(8, device=bench.device)
    small.add_(1.0)
    bench.wait()
    start = now()
    for _ in range(LAUNCHES):
        small.add_(1.0)
    bench.wait()
    seconds = lap_since(start).wall_s / LAUNCHES
    return Lap(seconds, seconds)
