"""Seconds per output token of real serving runs, each group predicted by constants fitted to the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.calibrate.folds import hold_out, shuffled_folds
from moesim.calibrate.serving import MakeKernels, Priced, predict_tpot_s, predict_with, price_runs, roofline_kernels
from moesim.costs.calibration import NAMES, Calibration, Floats, starting_values
from moesim.files.runs import Run
from moesim.validate.cases import Case, Validation

QUEUED = 3.0
"""Requests that wait this many times longer for their first token than they then decode were not decoded together."""


def plain_roofline(runs: Sequence[Run]) -> Floats:
    """Seconds per output token from datasheets and stated efficiencies: every factor 1, no host, nothing fitted."""
    values = dict(zip(NAMES, starting_values(), strict=True))
    values |= {name: 1.0 for name in NAMES if name.endswith("_factor")} | {"iteration_overhead_s": 0.0}
    return predict_tpot_s(price_runs(runs), np.array([values[name] for name in NAMES]))


def validate_serving(
    runs: Sequence[Run], make_kernels: MakeKernels | None = None, calibration: Calibration | None = None
) -> Validation:
    """Predict every run: by a calibration fitted to others, or by cross-validation grouped by (model, system, backend).

    Runs of a group that it was fitted to, and runs whose recipe was told apart by their measured times, are marked as
    fitted, and count in no error.

    Raises:
        ValueError: runs with unknown models or machines; without a calibration, runs of fewer than three groups;
            with one, kernels from elsewhere than its own.
    """
    priced = price_runs(runs, make_kernels or roofline_kernels)
    if calibration is not None:
        if calibration.needs_tables != (make_kernels is not None):
            raise ValueError(
                f"calibration: it was fitted with kernels of {calibration.kernels!r}; give the same to predict"
            )
        predicted_N, low_N, high_N = predict_with(calibration, priced)
        facts = {
            "split": f"all by one calibration, fitted to {', '.join(calibration.facts.get('groups', ['other runs']))}"
        }
    else:
        held = hold_out(priced, [run.group for run in runs])
        predicted_N, low_N, high_N = held.predicted_s_N, held.low_s_N, held.high_s_N
        facts = {
            "split": "no run of a (model, system, backend) is used for the constants that predict it",
            "easier split, by configuration inside the groups": _easier(priced),
        }
    rows = zip(runs, predicted_N, low_N, high_N, plain_roofline(runs), strict=True)
    seen = set(calibration.facts.get("groups", ())) if calibration else set()
    cases = tuple(
        Case(
            run.name,
            run.tpot_s,
            float(predicted),
            float(low),
            float(high),
            run.group in seen or run.is_told_by_time,
            run.group,
            float(plain),
        )
        for run, predicted, low, high, plain in rows
    )
    facts = {"kernels": "measured tables" if make_kernels else "roofline"} | facts | _set_aside(runs, predicted_N)
    return Validation("serving", cases, facts)


def _set_aside(runs: Sequence[Run], predicted_N: Floats) -> dict[str, str]:
    """Errors with the runs that do not count, and without those that something is to be said of."""
    error_N = np.abs(predicted_N / np.array([run.tpot_s for run in runs]) - 1)
    told_N = np.array([run.is_told_by_time for run in runs])
    queued_N = np.array([(run.ttft_s or 0.0) > QUEUED * run.tpot_s * run.output_tokens for run in runs])
    said = {}
    if told_N.any():
        said["runs whose recipe was told apart by their times"] = f"{told_N.sum()}, not counted; with: {_said(error_N)}"
    if queued_N.any():
        rest_N = error_N[~queued_N & ~told_N]
        said["runs whose requests mostly waited, so that concurrency is not the batch"] = (
            f"{queued_N.sum()}, counted; without: {_said(rest_N)}"
        )
    return said


def _easier(priced: Priced) -> str:
    held = hold_out(priced, shuffled_folds([run.configuration for run in priced.runs]))
    return _said(np.abs(held.predicted_s_N / priced.tpot_s_N - 1))


def _said(error_N: Floats) -> str:
    if not len(error_N):
        return "none left"
    return f"median {np.median(error_N):.1%}, 75th percentile {np.percentile(error_N, 75):.1%} of {len(error_N)} runs"
