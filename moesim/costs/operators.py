"""Seconds of a model's operators on one device, and what they rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.costs import compute
from moesim.hardware import SOURCES, Device
from moesim.model import BYTES_PER_PARAM

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Timed:
    """Seconds of some work, an array, and how many of them (mean over its entries) rest on each of `SOURCES`, [X]."""

    seconds: Floats
    rests_X: Floats

    @classmethod
    def of(cls, seconds: Floats | float, source: int) -> Timed:
        """Seconds that rest on one of `SOURCES` alone."""
        rests_X = np.zeros(len(SOURCES))
        rests_X[source] = np.mean(seconds)
        return cls(np.asarray(seconds, np.float64), rests_X)

    def __add__(self, other: Timed) -> Timed:
        return Timed(self.seconds + other.seconds, self.rests_X + other.rests_X)

    def repeated(self, times: int) -> Timed:
        """Each entry along the last axis several times in a row."""
        return Timed(np.repeat(self.seconds, times, axis=-1), self.rests_X)

    @property
    def shares_X(self) -> Floats:
        """Share of the seconds that rests on each of `SOURCES`; all 0 where there are none."""
        total = self.rests_X.sum()
        return self.rests_X / total if total else self.rests_X


def stacked(parts: Sequence[Timed]) -> Timed:
    """Several works of one shape along a new first axis."""
    return Timed(np.stack([part.seconds for part in parts]), np.mean([part.rests_X for part in parts], axis=0))


@dataclass(frozen=True, eq=False)
class Operators:
    """The operators of one device.

    bound: "value", or the "low" or "high" end of what is believed of its numbers.
    """

    device: Device
    bound: str = "value"

    def matmuls(self, shapes: Sequence[tuple[int, int]], rows: Floats, weight_dtype: str, value_bytes: float) -> Timed:
        """Products of `rows` rows with weights (n, k), one after another, each on its own roofline.

        seconds = sum over (n, k) of max(2 rows n k / peak, (n k weight bytes + rows (n + k) value_bytes) / bandwidth),
        and none for 0 rows.
        """
        rows = np.asarray(rows, np.float64)
        total = np.zeros_like(rows)
        for n, k in shapes:
            num_bytes = n * k * BYTES_PER_PARAM[weight_dtype] + rows * (n + k) * value_bytes
            total += compute.gemm_s(2.0 * n * k * rows, num_bytes, self.device, weight_dtype, bound=self.bound)
        return self._roofline(total * (rows > 0), "gemm")

    def experts(
        self, load_LRS: NDArray[np.int32], params_LRS: Floats | float, hidden_size: int, weight_dtype: str
    ) -> Timed:
        """Grouped product of the experts of each rank, [L, R]: see `compute.experts_s`."""
        seconds = compute.experts_s(load_LRS, params_LRS, hidden_size, self.device, weight_dtype, self.bound)
        return self._roofline(seconds, "grouped_gemm")

    def attention_core(self, score_flops: Floats, num_bytes: Floats) -> Timed:
        """Scores and weighted sum over the cache: see `compute.attention_core_s`."""
        seconds = compute.attention_core_s(score_flops, num_bytes, self.device, self.bound)
        return self._roofline(seconds, "attention")

    def launches(self, number: Floats | float, latency_s: float = 0.0) -> Timed:
        """Time to start as many kernels, and until the first byte arrives over a link."""
        seconds = number * compute.launch_s(self.device, self.bound) + latency_s
        return Timed.of(seconds, compute.launch_source(self.device))

    def network(self, seconds: Floats | float) -> Timed:
        """Seconds of bytes on a link."""
        return Timed.of(seconds, compute.source(self.device, "network"))

    def _roofline(self, seconds: Floats, kind: str) -> Timed:
        return Timed.of(seconds, compute.source(self.device, kind, "memory"))
