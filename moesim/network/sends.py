"""Messages between ranks in rounds, and how long they take on a fabric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.network.fair import link_bound_s, play
from moesim.network.routes import Fabric

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sends:
    """Messages that start together, [F] each; those without bytes, or from a rank to itself, are left out.

    Ranks are 0 to R - 1; R + n stands for the switch of node n, where messages are added up or copied in the network.
    """

    source_F: Ints
    target_F: Ints
    bytes_F: Floats

    @classmethod
    def of(cls, source: ArrayLike, target: ArrayLike, num_bytes: ArrayLike) -> Sends:
        """Sends from arrays that broadcast against each other."""
        given = np.broadcast_arrays(np.asarray(source, np.int64), np.asarray(target, np.int64), np.asarray(num_bytes))
        source_F, target_F, bytes_F = (np.ravel(array) for array in given)
        keep = (bytes_F > 0) & (source_F != target_F)
        return cls(source_F[keep], target_F[keep], bytes_F[keep].astype(np.float64))

    @classmethod
    def of_matrix(cls, bytes_RR: Floats) -> Sends:
        """One message from each rank (row) to each other one (column)."""
        source, target = np.indices(bytes_RR.shape)
        return cls.of(source, target, bytes_RR)

    def matrix(self, num_ranks: int) -> Floats:
        """Bytes between ranks, [R, R]."""
        found = np.zeros((num_ranks, num_ranks))
        np.add.at(found, (self.source_F, self.target_F), self.bytes_F)
        return found


Schedule = Sequence[Sends]
"""Rounds: the next one starts when all of the last one has arrived."""


def seconds(
    schedule: Schedule,
    fabric: Fabric,
    start_s: float = 0.0,
    half_size_bytes: float = 0.0,
    is_played: bool = False,
    tolerance: float = 0.01,
) -> list[float]:
    """Seconds of each round: its start, the latency of its paths, and its bytes.

    Args:
        start_s: to start a round.
        half_size_bytes: size of a message that reaches half of a link's rate (n_1/2, Hockney, Parallel Computing 1994):
            every message takes so many bytes more.
        is_played: whether flows share links fairly until the last has arrived; else the fullest link and the longest
            path decide, which is never longer.
        tolerance: of playing, see `play`.
    """
    known: dict[int, float] = {}
    for sends in schedule:
        if id(sends) in known:  # rings send the same again and again
            continue
        if not len(sends.bytes_F):
            known[id(sends)] = 0.0
            continue
        routes, bytes_F = fabric.routes(sends.source_F, sends.target_F), sends.bytes_F + half_size_bytes
        if is_played:
            done_F = play(routes, bytes_F, fabric.bytes_per_s_K, fabric.latency_s_K, tolerance)
            known[id(sends)] = start_s + float(done_F.max())
        else:
            latency_s = float(routes.sum_over(fabric.latency_s_K).max())
            known[id(sends)] = start_s + max(latency_s, link_bound_s(routes, bytes_F, fabric.bytes_per_s_K))
    return [known[id(sends)] for sends in schedule]
