"""Which forward passes are timed, and their times as a file; no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

from moesim.profile.rounds import Samples

COLUMNS = ("device", "model", "layers", "phase", "batch", "tokens", "context", "mode", "p20_s", "median_s", "p80_s")


class Forward(NamedTuple):
    """One pass of `batch` requests, each with `tokens` new tokens after `context` cached ones.

    mode: "resident", or "streamed" where experts come from host memory.
    """

    model: str
    layers: int
    batch: int
    tokens: int
    context: int
    mode: str

    @property
    def phase(self) -> str:
        """Decode has a cache."""
        return "decode" if self.context else "prefill"

    @property
    def key(self) -> str:
        """Its name among the timings."""
        return f"forward/{self.model}/{self.layers}/{self.mode}/{self.batch}x{self.tokens}+{self.context}"


def forward_grid(model: str, layers: int) -> list[Forward]:
    """Prefill of short and long prompts and decode of small and large batches, resident and streamed."""
    passes = [(batch, tokens, 0) for batch in (1, 4) for tokens in (128, 1024)]
    passes += [(batch, 1, context) for batch in (1, 8, 32) for context in (128, 1024)]
    return [Forward(model, layers, *sizes, mode) for mode in ("resident", "streamed") for sizes in passes]


def forward_csv(runs: Sequence[Forward], samples: Samples, device: str) -> str:
    """The passes that were timed as CSV, one a line, in seconds of the wall."""
    found = samples.percentiles("wall_s")
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for run in runs:
        if run.key in found:
            times = [f"{seconds:.6g}" for seconds in found[run.key]]
            rows.writerow(
                [device, run.model, run.layers, run.phase, run.batch, run.tokens, run.context, run.mode, *times]
            )
    return text.getvalue()
