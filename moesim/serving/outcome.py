"""What a serving run leaves: times of every request, and what the instances did over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ITL_EDGES_S = np.concatenate([[0.0], np.geomspace(1e-5, 1e3, 1601)])
"""Edges of the histogram of gaps between a request's tokens, 1.16 % apart."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """One run. Q requests in order of arrival; times in seconds from the start, NaN where it did not come to that.

    Attributes:
        arrival_s_Q: when each was sent (for closed loops, when its client sent it).
        scheduled_s_Q, first_token_s_Q, finish_s_Q: first taken into an iteration; first and last token out.
        prompt_Q, output_Q, topic_Q, priority_Q: as asked for; generated_Q: tokens that came out.
        cached_Q: tokens of the prompt whose keys and values were there already.
        preempted_Q: how often it lost its place; worst_itl_s_Q: its longest gap between two tokens.
        instance_Q, group_Q: who served (decoded) it, -1 for nobody; dropped_Q: whether it was refused.
        itl_counts: gaps between tokens by `ITL_EDGES_S`, all requests, int64 [len(ITL_EDGES_S) - 1] and what is beyond
            in the last.
        timeline: name -> [S] samples over time: "time_s" (end of a window), and means over the window and all
            instances: "running", "waiting" (requests), "kv_fraction", "imbalance" (busiest rank's choices over the
            mean), "output_tokens_per_s", "instances" (that are up).
        parts_s: part of an iteration (`moesim.serving.work.PARTS`) -> exposed seconds, summed over instances and
            iterations, mean over their ranks.
        shares: measured_fraction, fitted_fraction, datasheet_fraction, assumed_fraction of the busy time.
        busy_s: seconds of iterations, summed over instances; num_iterations; device_s: seconds that devices were held,
            summed over devices.
        seconds: length of the run; is_partial: whether it was stopped before its end.
        notes: what a reader should know.
    """

    arrival_s_Q: Floats
    scheduled_s_Q: Floats
    first_token_s_Q: Floats
    finish_s_Q: Floats
    prompt_Q: Ints
    output_Q: Ints
    generated_Q: Ints
    cached_Q: Ints
    preempted_Q: Ints
    worst_itl_s_Q: Floats
    instance_Q: Ints
    group_Q: Ints
    dropped_Q: NDArray[np.bool_]
    topic_Q: Ints
    priority_Q: Ints
    itl_counts: Ints
    timeline: Mapping[str, Floats]
    parts_s: Mapping[str, float]
    shares: Mapping[str, float]
    busy_s: float
    num_iterations: int
    device_s: float
    seconds: float
    is_partial: bool = False
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
