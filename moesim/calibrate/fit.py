"""A robust fit of few bounded constants: Huber loss on log errors, prior beliefs, damped Gauss-Newton steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moesim.costs.calibration import Constant, Floats

HUBER = 0.1
"""Log errors beyond which a run pulls with constant force."""
NOISE = 0.1
"""Log error that one run is believed to have; sets the weight of the runs against the beliefs."""
GROUP_RUNS = 40.0
"""A group counts as at most so many runs, so that a large one does not drown the others."""


def fit_constants(
    predict: Callable[[Floats], Floats], measured_N: Floats, constants: Sequence[Constant],
    weights_N: Floats | None = None, max_steps: int = 60,
) -> Floats:  # fmt: skip
    """Values of the constants that explain the measurements best.

    minimise  sum over N of weight x huber(log predicted - log measured) / noise^2
              + sum over constants of ((coordinate - start) / spread)^2

    Args:
        predict: values of the constants -> positive predictions, [N].
        measured_N: positive measurements.
        constants: where they start, how far they are believed to lie from there, and their ranges.
        weights_N: of each measurement; all 1 without.

    Returns:
        Values in the order of `constants`, each inside its range.

    Source: iteratively reweighted least squares for Huber's M-estimator (Holland, Welsch, Commun. Stat. 1977), with
        Levenberg's damping and projection on the box.
    """
    start = np.array([constant.coordinate(constant.value) for constant in constants])
    spread = np.array([constant.spread for constant in constants])
    low = np.array([constant.coordinate(constant.low) for constant in constants])
    high = np.array([constant.coordinate(constant.high) for constant in constants])
    weights_N = np.ones(len(measured_N)) if weights_N is None else weights_N
    log_measured_N = np.log(measured_N)

    def log_predicted(x: Floats) -> Floats:
        values = np.array([constant.at(v) for constant, v in zip(constants, x, strict=True)])
        return np.log(predict(values))

    def loss(x: Floats, log_N: Floats) -> float:
        error_N = np.abs(log_N - log_measured_N)
        huber_N = np.where(error_N < HUBER, error_N**2, 2 * HUBER * error_N - HUBER**2)
        return float((weights_N * huber_N).sum() / NOISE**2 + (((x - start) / spread) ** 2).sum())

    x, damping = start.copy(), 1e-3
    log_N = log_predicted(x)
    best = loss(x, log_N)
    for _ in range(max_steps):
        slope_NC = np.stack([(log_predicted(x + 1e-4 * unit) - log_N) / 1e-4 for unit in np.eye(len(x))], axis=1)
        error_N = log_measured_N - log_N
        pull_N = weights_N * HUBER / np.maximum(np.abs(error_N), HUBER) / NOISE**2
        curve = slope_NC.T @ (pull_N[:, None] * slope_NC) + np.diag(spread**-2.0)
        down = slope_NC.T @ (pull_N * error_N) - (x - start) / spread**2
        moved = False
        while not moved and damping < 1e8:
            step = np.linalg.solve(curve + damping * np.diag(np.diag(curve)), down)
            trial = np.clip(x + step, low, high)
            trial_N = log_predicted(trial)
            moved = loss(trial, trial_N) < best
            damping = damping / 3 if moved else damping * 4
        if not moved:
            break
        gained, x, log_N = best - loss(trial, trial_N), trial, trial_N
        best -= gained
        if gained < 1e-9 * max(best, 1.0):
            break
    return np.array([min(max(c.at(v), c.low), c.high) for c, v in zip(constants, x, strict=True)])


def group_weights(labels: Sequence[str]) -> Floats:
    """A weight for each run: a group of many runs counts as `GROUP_RUNS` of them."""
    count = {label: labels.count(label) for label in set(labels)}
    return np.array([min(1.0, GROUP_RUNS / count[label]) for label in labels])
