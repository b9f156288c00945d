"""Multilinear interpolation on a ragged grid: every value of an axis has its own list of values of the next one.

Measured sweeps are rarely full grids: long prompts are timed in small batches only, and each model has its own widths.
So the points are kept as a tree, one level per axis. A query walks down it between the two nearest values at each
level, and ends in at most 2^D points with weights. Where a branch does not reach as far as the query, its border
value serves, and the query counts as outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TINY = 1e-9
"""Weights below this are rounding."""


@dataclass(frozen=True)
class Stencil:
    """For M queries: points with weights, P in all.

    Attributes:
        query_P, point_P, weight_P: query and point of each part, and its weight; a query's weights add up to 1.
        inside_M: whether no value of the query had to be clipped to what was measured.
        between_MD: whether the query lies between two values of the axis, rather than on one.
    """

    query_P: Ints
    point_P: Ints
    weight_P: Floats
    inside_M: NDArray[np.bool_]
    between_MD: NDArray[np.bool_]

    def mix(self, field_N: Floats) -> Floats:
        """The field's value at each query, [M]."""
        found = np.bincount(self.query_P, self.weight_P * field_N[self.point_P], len(self.inside_M))
        return np.asarray(found, np.float64)


@dataclass(frozen=True)
class _Level:
    """Children of all nodes of one level, node after node.

    known_U: all values of the axis; value_C, key_C: of each child its value, and node x U + rank of the value;
    start_V: first child of each node, and one past the last.
    """

    known_U: Floats
    value_C: Floats
    key_C: Ints
    start_V: Ints


class RaggedGrid:
    """The tree over points [N, D], no two alike."""

    def __init__(self, points_ND: Floats) -> None:
        self.order = np.argsort([len(np.unique(column)) for column in points_ND.T], kind="stable")
        columns = points_ND[:, self.order].T
        self.rows_N = np.lexsort(columns[::-1])
        self.levels: list[_Level] = []
        node_N = np.zeros(len(points_ND), np.int64)
        for column in columns[:, self.rows_N]:
            known, rank_N = np.unique(column, return_inverse=True)
            key_N = node_N * len(known) + rank_N
            first = np.flatnonzero(np.r_[True, key_N[1:] != key_N[:-1]])
            parents = node_N[first]
            start = np.searchsorted(parents, np.arange(parents[-1] + 2))
            self.levels.append(_Level(known, column[first], key_N[first], start))
            node_N = np.cumsum(np.r_[0, key_N[1:] != key_N[:-1]])

    def locate(self, query_MD: Floats) -> Stencil:
        """Points and weights for each query."""
        M, D = query_MD.shape
        query, node, weight = np.arange(M), np.zeros(M, np.int64), np.ones(M)
        inside, between = np.ones(M, bool), np.zeros((M, D), bool)
        for axis, level in zip(self.order, self.levels, strict=True):
            x = query_MD[query, axis]
            rank = np.searchsorted(level.known_U, x, side="right") - 1
            child = np.searchsorted(level.key_C, node * len(level.known_U) + rank, side="right") - 1
            low = np.clip(child, level.start_V[node], level.start_V[node + 1] - 1)
            high = np.minimum(low + 1, level.start_V[node + 1] - 1)
            below, above = level.value_C[low], level.value_C[high]
            part = np.clip((x - below) / np.where(above > below, above - below, 1.0), 0.0, 1.0)
            clipped = (x < below - TINY) | (x > above + TINY)
            inside[query[clipped]] = False
            two, one = part > TINY, part < 1 - TINY
            between[query[two & one], axis] = True
            query = np.r_[query[one], query[two]]
            node = np.r_[low[one], high[two]]
            weight = np.r_[(weight * (1 - part))[one], (weight * part)[two]]
        weight /= np.bincount(query, weight, M)[query]
        return Stencil(query, self.rows_N[node], weight, inside, between)


def neighbours(points_ND: Floats, axis: int) -> tuple[Ints, Ints, Ints, Floats]:
    """Points with one on either side along the axis, all else equal: the point, those two, and the second's weight."""
    others = [column for index, column in enumerate(points_ND.T) if index != axis]
    rows = np.lexsort((points_ND[:, axis], *others))
    same = np.ones(len(rows) - 1, bool)
    for column in others:
        same &= np.diff(column[rows]) == 0
    middle = np.flatnonzero(same[:-1] & same[1:]) + 1
    point, below, above = rows[middle], rows[middle - 1], rows[middle + 1]
    x = points_ND[:, axis]
    return point, below, above, (x[point] - x[below]) / (x[above] - x[below])
