"""Fitting a calibration to runs, and judging it by runs held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.calibrate.folds import HeldOut, fit_runs, hold_out, quantiles, shuffled_folds
from moesim.calibrate.serving import Priced, predict_tpot_s
from moesim.costs.calibration import CONSTANTS, NAMES, Calibration, Constant, Floats
from moesim.files.runs import groups_of


def calibrate(priced: Priced, kernels: str, constants: Sequence[Constant] = CONSTANTS) -> tuple[Calibration, HeldOut]:
    """Fit the constants to runs, and judge them by cross-validation.

    Runs are held out by group where there are three groups or more, else by configuration; the residuals of those
    predictions, every fold of equal weight, are the interval of later ones.

    Raises:
        ValueError: fewer than three groups and fewer than three configurations.
    """
    groups = groups_of(priced.runs)
    by_group = len(groups) >= 3
    folds = [run.group for run in priced.runs] if by_group else shuffled_folds([r.configuration for r in priced.runs])
    held = hold_out(priced, folds, constants)
    values = fit_runs(priced, constants)
    errors_N = held.log_errors(priced)
    low, high = quantiles(errors_N, np.array([1.0 / folds.count(fold) for fold in folds]))
    absolute_N = np.abs(np.expm1(-errors_N))
    said = f"fitted: {len(priced.runs)} runs of {', '.join(groups)}"
    sources = {
        c.name: said if _matters(priced, values, i) else "assumed: no run speaks of it" for i, c in enumerate(constants)
    }
    fit_errors_N = np.abs(predict_tpot_s(priced, values) / priced.tpot_s_N - 1)
    facts = {
        "runs": len(priced.runs),
        "groups": groups,
        "held_out_by": "group" if by_group else "configuration",
        "median_abs_error": float(np.median(absolute_N)),
        "p75_abs_error": float(np.percentile(absolute_N, 75)),
        "fit_median_abs_error": float(np.median(fit_errors_N)),
        "at_a_bound": [
            c.name for c, v in zip(constants, values, strict=True) if min(v / c.low, c.high / v) < 1.001
        ],
    }  # fmt: skip
    named = dict(zip(NAMES, map(float, values), strict=True))
    return Calibration(named, sources, float(np.exp(low)), float(np.exp(high)), kernels, facts), held


def _matters(priced: Priced, values: Floats, index: int) -> bool:
    """Whether any prediction moves with a constant."""
    moved = values.copy()
    moved[index] *= 0.9
    return bool(np.abs(predict_tpot_s(priced, moved) / predict_tpot_s(priced, values) - 1).max() > 1e-6)
