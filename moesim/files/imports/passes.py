"""Which request each token of a series of forward passes belongs to, where passes name no requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXTEND, DECODE, MIXED = 1, 2, 3
"""Forward modes of SGLang (`ForwardMode`) whose passes are read here."""


@dataclass(frozen=True, eq=False)
class PassTokens:
    """Tokens of all passes in the order recorded, arrays [T]."""

    request_T: NDArray[np.int64]
    position_T: NDArray[np.int64]
    is_decode_T: NDArray[np.bool_]
    token_id_T: NDArray[np.int64]


def requests_of(path: Path, records: Sequence[Mapping[str, Any]]) -> PassTokens:
    """Follow requests through the passes of an SGLang per_token recording, which keeps positions but no request names.

    A prefill piece (`extend_seq_lens` cuts the tokens of a pass into pieces) that starts at position p > 0 goes on
    with a request that stands at p, if there is one (chunked prefill), and begins a request otherwise (its start was
    cached). A decode token at position p goes on with the request that stands at p; of several, those that took part
    in the latest decode pass go first, in batch order. Only requests of the same length can be taken for each other:
    one that ended and one that goes on.

    Raises:
        ValueError: a pass is neither prefill nor decode, or its lists do not fit together.
    """
    walk = _Walk()
    request_T: list[int] = []
    position_T: list[int] = []
    is_decode_T: list[bool] = []
    token_id_T: list[int] = []
    for number, record in enumerate(records):
        where, mode = f"{path}: records[{number}]", record.get("forward_mode")
        positions, ids = _whole(record.get("positions")), _whole(record.get("input_ids"))
        if positions is None or ids is None or len(positions) != len(ids):
            raise ValueError(f"{where} needs lists of whole numbers, positions and input_ids, of one length")
        if not positions:
            continue
        lengths = [1] * len(positions) if mode == DECODE else _whole(record.get("extend_seq_lens"))
        if mode not in (EXTEND, DECODE, MIXED):
            raise ValueError(
                f"{where}.forward_mode must be 1 (extend), 2 (decode) or 3 (mixed); given {mode!r}; record without "
                "speculative decoding"
            )
        if lengths is None or sum(lengths) != len(positions):
            raise ValueError(f"{where}.extend_seq_lens must sum to its {len(positions)} tokens; given {lengths!r}")
        for length, (request, decode) in zip(lengths, walk.step(positions, lengths, mode), strict=True):
            request_T += [request] * length
            is_decode_T += [decode] * length
        position_T += positions
        token_id_T += ids
    return PassTokens(
        np.array(request_T, np.int64),
        np.array(position_T, np.int64),
        np.array(is_decode_T, np.bool_),
        np.array(token_id_T, np.int64),
    )


def _whole(values: Any) -> list[int] | None:
    """The list itself, if it is one of whole numbers, none negative."""
    return values if isinstance(values, list) and all(type(v) is int and v >= 0 for v in values) else None


class _Walk:
    """Requests by the position they stand at."""

    def __init__(self) -> None:
        self._at: dict[int, list[int]] = {}
        self._latest_R: list[int] = []
        self._decodes_R: list[bool] = []
        self._num_decode_passes = 0

    def step(self, positions: Sequence[int], lengths: Sequence[int], mode: int) -> list[tuple[int, bool]]:
        """The request of each piece of a pass, and whether the piece is decode."""
        self._num_decode_passes += mode in (DECODE, MIXED)
        pieces, moved, start = [], [], 0
        for length in lengths:
            if not length:
                pieces.append((0, False))
                continue
            position = positions[start]
            request = self._take(position) if position else None
            goes_on = request is not None
            if request is None:
                request = len(self._latest_R)
                self._latest_R.append(0)
                self._decodes_R.append(False)
            decode = mode == DECODE or self._decodes_R[request] or (mode == MIXED and length == 1 and goes_on)
            self._decodes_R[request] = decode
            self._latest_R[request] = self._num_decode_passes
            pieces.append((request, decode))
            moved.append((positions[start + length - 1] + 1, request))
            start += length
        for position, request in moved:
            self._at.setdefault(position, []).append(request)
        return pieces

    def _take(self, position: int) -> int | None:
        """The first of the requests at a position that took part most recently."""
        waiting = self._at.get(position)
        if not waiting:
            return None
        latest = max(self._latest_R[request] for request in waiting)
        request = next(request for request in waiting if self._latest_R[request] == latest)
        waiting.remove(request)
        return request
