"""Predictions of runs by constants that no run of their own group was used for, with intervals from other groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.calibrate.fit import fit_constants, group_weights
from moesim.calibrate.serving import Priced, predict_tpot_s
from moesim.costs.calibration import CONSTANTS, LEVEL, Constant, Floats


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Predictions for N runs, each by constants fitted without its fold; seconds.

    values: fold -> constants fitted without it.
    """

    predicted_s_N: Floats
    low_s_N: Floats
    high_s_N: Floats
    values: dict[str, Floats]

    def log_errors(self, priced: Priced) -> Floats:
        """log(measured / predicted) of each run, [N]."""
        return np.asarray(np.log(priced.tpot_s_N / self.predicted_s_N))


def fit_runs(priced: Priced, constants: Sequence[Constant] = CONSTANTS) -> Floats:
    """Constants fitted to all of the runs."""
    weights_N = group_weights([run.group for run in priced.runs])
    return fit_constants(lambda values: predict_tpot_s(priced, values), priced.tpot_s_N, constants, weights_N)


def hold_out(priced: Priced, folds: Sequence[str], constants: Sequence[Constant] = CONSTANTS) -> HeldOut:
    """Predict every fold by constants fitted to the others.

    The interval of a fold comes from the others alone: each of them is predicted in turn by a fit without it and
    without the fold, and the 5 % and 95 % quantiles of log(measured / predicted), every fold of equal weight, are its
    ends.

    Raises:
        ValueError: fewer than three folds, so that no interval can be had without the fold itself.
    """
    names = list(dict.fromkeys(folds))
    if len(names) < 3:
        raise ValueError(f"runs: cross-validation needs at least 3 groups, given {len(names)}: {', '.join(names)}")
    fold_N = np.array([names.index(fold) for fold in folds])
    predicted_N, low_N, high_N = (np.zeros(len(fold_N)) for _ in range(3))
    values: dict[str, Floats] = {}
    without: dict[frozenset[int], Floats] = {}
    for f, name in enumerate(names):
        rows = np.flatnonzero(fold_N == f)
        values[name] = fit_runs(priced.take(np.flatnonzero(fold_N != f)), constants)
        residuals, weights = [], []
        for g in range(len(names)):
            if g == f:
                continue
            pair = frozenset((f, g))
            if pair not in without:
                rest = priced.take(np.flatnonzero((fold_N != f) & (fold_N != g)))
                without[pair] = fit_runs(rest, constants)
            other = priced.take(np.flatnonzero(fold_N == g))
            residuals.append(np.log(other.tpot_s_N / predict_tpot_s(other, without[pair])))
            weights.append(np.full(len(other.runs), 1.0 / len(other.runs)))
        ends = quantiles(np.concatenate(residuals), np.concatenate(weights))
        predicted_N[rows] = predict_tpot_s(priced.take(rows), values[name])
        low_N[rows], high_N[rows] = predicted_N[rows] * np.exp(ends[0]), predicted_N[rows] * np.exp(ends[1])
    return HeldOut(predicted_N, low_N, high_N, values)


def quantiles(residuals_N: Floats, weights_N: Floats | None = None) -> tuple[float, float]:
    """Ends of the central `LEVEL` of log residuals, with 0 between them."""
    weights_N = np.ones(len(residuals_N)) if weights_N is None else weights_N
    order = np.argsort(residuals_N)
    share_N = (np.cumsum(weights_N[order]) - weights_N[order] / 2) / weights_N.sum()
    low, high = np.interp([(1 - LEVEL) / 2, (1 + LEVEL) / 2], share_N, residuals_N[order])
    return min(float(low), 0.0), max(float(high), 0.0)


def shuffled_folds(configurations: Sequence[str], num_folds: int = 5, seed: int = 0) -> list[str]:
    """A fold for each run, runs of one configuration together: the easier split, inside the groups."""
    names = sorted(set(configurations))
    fold = dict(zip(names, np.random.default_rng(seed).permutation(len(names)) % num_folds, strict=True))
    return [f"fold {fold[name]}" for name in configurations]
