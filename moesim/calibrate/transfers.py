"""Fitting transfers to measured collectives, robustly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.calibrate.fit import fit_constants
from moesim.costs.calibration import Constant
from moesim.network.transfer import Transfer

Floats = NDArray[np.float64]


def fit_transfer(bytes_N: Floats, seconds_N: Floats) -> Transfer:
    """The transfer that explains the times of as many sizes best, in relative error.

    It starts from the shortest time and the best rate that were seen; what the sizes do not tell of stays near there.

    Raises:
        ValueError: fewer than three sizes.
    """
    if len(bytes_N) < 3:
        raise ValueError(f"a transfer is fitted to 3 sizes or more, given {len(bytes_N)}")
    start_s, rate = float(seconds_N.min()), float((bytes_N / seconds_N).max())
    chunk = float(np.median(bytes_N))
    constants = (
        Constant("start_s", start_s, 0.3, start_s / 10, float(seconds_N.max()), "s", ""),
        Constant("bytes_per_s", rate, 0.5, rate / 10, rate * 10, "bytes/s", ""),
        Constant("fill", 2.0, 1.5, 1e-3, 100.0, "", ""),
        Constant("chunk_bytes", chunk, 2.0, float(bytes_N.min()), float(bytes_N.max()), "bytes", ""),
    )
    values = fit_constants(lambda v: Transfer(*v).seconds(bytes_N), seconds_N, constants, max_steps=100)
    return Transfer(*map(float, values))
