"""What watching costs: the same batch run bare and watched in turn, in CPU time.

Paired and alternating, so that a machine that slows down slows both; the median of the pairs' ratios, so that one
disturbed run does not count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.capture.capture import Watch, sampler
from moesim.capture.passes import check_stack, run_batch


class Overhead(NamedTuple):
    """Median CPU time of one phase, bare and watched.

    Attributes:
        watched: what was recorded.
        phase: `prefill` or `decode`.
        bare_s: CPU seconds of the phase without hooks.
        watched_s: with them.
        overhead_ratio: median over pairs of watched to bare, less 1.
    """

    watched: str
    phase: str
    bare_s: float
    watched_s: float
    overhead_ratio: float


def measure_overhead(
    model: Any, prompts: Sequence[NDArray[np.int64]], output_tokens: int, watch: Watch, num_pairs: int
) -> list[Overhead]:
    """Overhead of recording ids and weights, then with 1, 2, ... horizons as `watch` asks, then with its scores.

    Raises:
        ValueError: the model cannot be captured so.
    """
    stack = check_stack(model, watch.stack)
    rows = []
    for watched, one in _steps(watch):
        recorder = one.recorder(model)
        pairs = []
        for pair in range(num_pairs + 1):
            times = {}
            for bare in (True, False) if pair % 2 else (False, True):
                with nullcontext() if bare else recorder as hooked:
                    times[bare] = _phases(model, hooked, prompts, output_tokens, stack)
            if pair:  # the first pair warms up
                pairs.append((times[True], times[False]))
        for phase, name in enumerate(("prefill", "decode") if output_tokens else ("prefill",)):
            bare_s, watched_s = zip(*((bare[phase], seen[phase]) for bare, seen in pairs), strict=True)
            ratios = [seen / bare - 1 for bare, seen in zip(bare_s, watched_s, strict=True)]
            rows.append(Overhead(watched, name, median(bare_s), median(watched_s), median(ratios)))
    return rows


def _steps(watch: Watch) -> list[tuple[str, Watch]]:
    """Growing demands, from ids and weights to all that `watch` asks."""
    horizons = 3 if watch.horizons is None else watch.horizons
    base = replace(watch, scores=False)
    steps = [("ids and weights", replace(base, horizons=0))]
    steps += [(f"+ {h} horizon{'s' * (h > 1)}", replace(base, horizons=h)) for h in range(1, horizons + 1)]
    return steps + ([("+ scores", replace(watch, horizons=horizons))] if watch.scores else [])


def _phases(
    model: Any, recorder: Any, prompts: Sequence[NDArray[np.int64]], output_tokens: int, stack: str | None
) -> list[float]:
    """CPU seconds of prefill and of decode."""
    ends = [time.process_time()]
    run_batch(
        model, recorder, list(prompts), output_tokens, sampler(0, 0), stack, lambda: ends.append(time.process_time())
    )
    return [after - before for before, after in pairwise(ends)]
