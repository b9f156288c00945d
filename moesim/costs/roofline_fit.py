"""A roofline fitted to measured times: the shape that a table is interpolated against, and continued with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ROWS = 4096
"""Rows that a fit looks at, evenly spaced over the times sorted by size."""


@dataclass(frozen=True)
class FittedRoofline:
    """seconds = floor_s + max(flops x s_per_flop, bytes x s_per_byte).

    Source: Williams, Waterman, Patterson, Roofline, CACM 2009, with a floor for the launch.
    """

    floor_s: float
    s_per_flop: float
    s_per_byte: float

    def seconds(self, flops: Floats, num_bytes: Floats) -> Floats:
        """Seconds for each amount of work."""
        return np.asarray(self.floor_s + np.maximum(flops * self.s_per_flop, num_bytes * self.s_per_byte))


def fit_roofline(flops_N: Floats, bytes_N: Floats, seconds_N: Floats) -> FittedRoofline:
    """The three constants with the least mean |log(measured / roofline)|, found by a search along each of them.

    It starts from the shortest time and from the best rates in the table. Where a table has no FLOP (or no bytes) that
    side stays 0.
    """
    rows = np.unique(np.linspace(0, len(seconds_N) - 1, min(ROWS, len(seconds_N))).astype(int))
    pick = np.argsort(seconds_N, kind="stable")[rows]
    flops, num_bytes, seconds = flops_N[pick], bytes_N[pick], seconds_N[pick]
    start = [seconds.min() * 0.9]
    for amount in (flops, num_bytes):
        busy = amount > 0
        start.append(float(np.percentile(seconds[busy] / amount[busy], 10)) if busy.any() else 0.0)
    constants = np.array(start)

    def loss(tried: Floats) -> float:
        return float(np.mean(np.abs(np.log(seconds / FittedRoofline(*tried).seconds(flops, num_bytes)))))

    best, step = loss(constants), 1.0
    while step > 0.005:
        before = best
        for index in np.flatnonzero(constants):
            for sign in (1, -1):
                tried = constants.copy()
                tried[index] *= np.exp(sign * step)
                found = loss(tried)
                if found < best:
                    best, constants = found, tried
        if best > before - 1e-6:
            step /= 2
    return FittedRoofline(*constants.tolist())
