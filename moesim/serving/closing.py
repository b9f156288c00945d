"""From the arrays of a run to its `Outcome`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.hardware import SOURCES
from moesim.requests import Requests
from moesim.serving.instance import Instance
from moesim.serving.outcome import Outcome
from moesim.serving.state import DROPPED, SAMPLES, Book, Timeline
from moesim.serving.work import PARTS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def outcome_of(
    requests: Requests, book: Book, instances: Sequence[Instance], timeline: Timeline, ups: Sequence[tuple[float, int]],
    instance_Q: Ints, group_Q: Ints, seconds: float, device_s: float, is_partial: bool, notes: Sequence[str],
) -> Outcome:  # fmt: skip
    """Close a run after so many seconds.

    Args:
        ups: from when on how many instances were up.
        device_s: seconds that devices were held, summed over devices.
    """
    parts_P = sum((instance.work.parts_P for instance in instances), np.zeros(len(PARTS)))
    rests_X = sum((instance.work.parts_P @ instance.prices.shares_PX for instance in instances), np.zeros(len(SOURCES)))
    total, sums_X = rests_X.sum() or 1.0, timeline.sums_WX.sum(axis=0)
    never_Q = np.isnan(book.sent_s_Q)
    return Outcome(
        arrival_s_Q=book.sent_s_Q if is_partial else np.where(never_Q, requests.arrival_s_Q, book.sent_s_Q),
        scheduled_s_Q=book.scheduled_s_Q, first_token_s_Q=book.first_s_Q, finish_s_Q=book.finish_s_Q,
        prompt_Q=book.prompt_Q, output_Q=book.output_Q, generated_Q=book.generated_Q, cached_Q=book.cached_Q,
        preempted_Q=book.preempted_Q, worst_itl_s_Q=book.worst_gap_s_Q, instance_Q=instance_Q,
        group_Q=np.where(instance_Q < 0, -1, group_Q), dropped_Q=book.state_Q == DROPPED, topic_Q=requests.topic_Q,
        priority_Q=requests.priority_Q, itl_counts=book.itl_counts,
        timeline=_windows(timeline, instances, ups, seconds),
        parts_s=dict(zip(PARTS, parts_P.tolist(), strict=True)),
        shares={f"{name}_fraction": float(x / total) for name, x in zip(SOURCES, rests_X, strict=True)},
        busy_s=float(sums_X[SAMPLES.index("iteration_s")]),
        num_iterations=sum(instance.num_iterations for instance in instances),
        device_s=device_s, seconds=seconds, is_partial=is_partial, notes=tuple(notes),
    )  # fmt: skip


def _windows(
    timeline: Timeline, instances: Sequence[Instance], ups: Sequence[tuple[float, int]], seconds: float
) -> Mapping[str, Floats]:
    """Means over each window of time, up to the end of the run."""
    width_s = float(timeline.width_s[0])
    number = max(1, min(len(timeline.sums_WX), int(np.ceil(seconds / width_s))))
    end_W = np.minimum(np.arange(1, number + 1) * width_s, max(seconds, 1e-12))
    long_W = np.diff(end_W, prepend=0.0)
    sums = dict(zip(SAMPLES, timeline.sums_WX[:number].T, strict=True))
    capacity = sum(len(i.groups.num_D) * i.rules.num_blocks * i.rules.block_size for i in instances)
    start_N, up_N = (np.array(values) for values in zip(*ups, strict=True))
    held_N = np.concatenate([[0.0], np.cumsum(np.diff(start_N) * up_N[:-1])])

    def held(at_W: Floats) -> Floats:
        last_W = np.searchsorted(start_N, at_W, side="right") - 1
        return np.asarray(held_N[last_W] + (at_W - start_N[last_W]) * up_N[last_W])

    return {
        "time_s": end_W,
        "running": sums["running"] / long_W,
        "waiting": sums["waiting"] / long_W,
        "kv_fraction": sums["kv_tokens"] / long_W / max(capacity, 1),
        "imbalance": np.divide(
            sums["imbalance"], sums["iterations"], out=np.full(number, np.nan), where=sums["iterations"] > 0
        ),
        "output_tokens_per_s": sums["output_tokens"] / long_W,
        "instances": (held(end_W) - held(end_W - long_W)) / long_W,
    }
