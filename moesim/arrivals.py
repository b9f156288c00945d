"""Made-up traffic: when requests come, and how long they are.

Arrival processes give times in seconds, non-decreasing, from 0: the first `num`, or all before `duration_s` (one of the
two is given). `rate_per_s` is always the mean rate in the long run. Lengths are whole tokens, at least 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Rng = np.random.Generator


@dataclass(frozen=True)
class Extent:
    """How much traffic: so many requests, or so many seconds; the other is None."""

    num: int | None = None
    duration_s: float | None = None


def poisson(rng: Rng, extent: Extent, rate_per_s: float) -> Floats:
    """Gaps without memory: users who know nothing of each other."""
    return _renewal(lambda num: rng.exponential(1 / rate_per_s, num), extent, rate_per_s)


def gamma(rng: Rng, extent: Extent, rate_per_s: float, cv: float) -> Floats:
    """Gaps of a gamma distribution with a coefficient of variation; 1 is Poisson, above it requests come in clumps.

    vLLM's `--burstiness` is 1 / cv^2.
    """
    shape = cv**-2
    return _renewal(lambda num: rng.gamma(shape, 1 / (rate_per_s * shape), num), extent, rate_per_s)


def constant(extent: Extent, rate_per_s: float) -> Floats:
    """Equal gaps, the first request at 0."""
    num = extent.num if extent.num is not None else math.ceil((extent.duration_s or 0.0) * rate_per_s)
    return np.arange(num) / rate_per_s


@dataclass(frozen=True)
class Bursts:
    """A load that switches between calm and bursts, both of exponential length.

    Attributes:
        ratio: rate in a burst over that in the calm, at least 1.
        fraction: of the time that is bursts, between 0 and 1.
        burst_s: mean seconds of a burst.
    """

    ratio: float
    fraction: float
    burst_s: float


def bursty(rng: Rng, extent: Extent, rate_per_s: float, bursts: Bursts) -> Floats:
    """A two-state Markov-modulated Poisson process, begun in the state that chance has it in.

    Source: Fischer and Meier-Hellstern 1993, the MMPP cookbook. A Poisson process of rate 1, its time stretched by the
    inverse of the accumulated rate.
    """
    calm_rate = rate_per_s / (1 + bursts.fraction * (bursts.ratio - 1))
    rates = np.array([calm_rate, calm_rate * bursts.ratio])
    means_s = np.array([bursts.burst_s * (1 - bursts.fraction) / bursts.fraction, bursts.burst_s])
    state = int(rng.random() < bursts.fraction)
    place: Floats | None = None
    if extent.num is not None:
        place = np.cumsum(rng.exponential(1.0, extent.num))
    ends_s, ends = np.zeros(1), np.zeros(1)  # of each stay in a state, and arrivals expected until then
    while ends[-1] <= place[-1] if place is not None else ends_s[-1] < (extent.duration_s or 0.0):
        # An even number, so that the next stays begin in the same state; twice as many each time.
        states = (state + np.arange(max(256, len(ends_s) - 1))) % 2
        stays_s = rng.exponential(means_s[states])
        ends_s = np.append(ends_s, ends_s[-1] + np.cumsum(stays_s))
        ends = np.append(ends, ends[-1] + np.cumsum(stays_s * rates[states]))
    if place is None:
        expected = float(np.interp(extent.duration_s or 0.0, ends_s, ends))
        place = poisson(rng, Extent(duration_s=expected), 1.0)
    return np.interp(place, ends, ends_s)


def diurnal(arrival_s_Q: Floats, depth: float, period_s: float) -> Floats:
    """The arrivals of a steady process, moved so that its rate swings by 1 + depth * sin(2 pi t / period_s).

    depth: 0 to below 1. The mean rate over whole periods, and the order, stay; a time t becomes the u with
    u + depth * period / 2 pi * (1 - cos(2 pi u / period)) = t, found between 4096 points of each period.
    """
    if not depth or not len(arrival_s_Q):
        return arrival_s_Q
    u = np.linspace(0, 1, 4097)
    within = u + depth / (2 * np.pi) * (1 - np.cos(2 * np.pi * u))
    whole, part = np.divmod(arrival_s_Q / period_s, 1.0)
    return (whole + np.interp(part, within, u)) * period_s


def lognormal_tokens(rng: Rng, num: int, mean: float, cv: float) -> Ints:
    """Lengths whose logarithm is normal, with that mean and coefficient of variation (before rounding)."""
    variance = math.log1p(cv**2)
    return whole_tokens(rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), num))


def geometric_tokens(rng: Rng, num: int, mean: float) -> Ints:
    """Lengths of a text that ends after each token with chance 1 / mean: the exponential law of whole numbers."""
    return rng.geometric(1 / mean, num).astype(np.int64)


def uniform_tokens(rng: Rng, num: int, low: int, high: int) -> Ints:
    """Every length from low to high, both included, equally often."""
    return rng.integers(low, high, num, endpoint=True)


def whole_tokens(tokens: Floats) -> Ints:
    """The nearest whole numbers, at least 1."""
    return np.maximum(np.rint(tokens), 1).astype(np.int64)


def _renewal(gaps: Callable[[int], Floats], extent: Extent, rate_per_s: float) -> Floats:
    """Times after independent gaps."""
    if extent.num is not None:
        return np.cumsum(gaps(extent.num))
    duration_s = extent.duration_s or 0.0
    expected = duration_s * rate_per_s
    parts, end_s = [np.zeros(0)], 0.0
    while end_s < duration_s:
        parts.append(end_s + np.cumsum(gaps(math.ceil(expected + 4 * math.sqrt(expected)) + 16)))
        end_s = float(parts[-1][-1])
    times = np.concatenate(parts)
    return times[times < duration_s]
