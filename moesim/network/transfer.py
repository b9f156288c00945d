"""Seconds of a collective by its size: what a start, a rate and the filling of a pipeline make of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Transfer:
    """A collective among so many ranks on one machine, in one protocol.

    seconds = start_s + (bytes + fill x chunk) / bytes_per_s, chunk = bytes chunk_bytes / (bytes + chunk_bytes)

    A message is cut in chunks, and the first has to pass `fill` further steps before the pipeline runs full. A small
    message is one chunk, which is smaller; chunks grow to `chunk_bytes`.

    Source: the alpha-beta model (Hockney, Parallel Computing 1994) with the filling of a pipeline (Sanders, Speck,
        Traeff, Parallel Computing 2009).

    >>> Transfer(1e-5, 1e9, 0.0, 1.0).seconds([0.0, 1e6]).tolist()
    [1e-05, 0.00101]
    """

    start_s: float
    bytes_per_s: float
    fill: float
    chunk_bytes: float

    def seconds(self, num_bytes: ArrayLike) -> Floats:
        """Seconds for each size."""
        size = np.asarray(num_bytes, np.float64)
        chunk = size * self.chunk_bytes / (size + self.chunk_bytes)
        return np.asarray(self.start_s + (size + self.fill * chunk) / self.bytes_per_s)
