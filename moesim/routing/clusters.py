"""k-means: groups of rows that are near each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.floating[Any]]
_BLOCK = 8192


def k_means(
    rows_ND: Rows, number: int, random: np.random.Generator, *, most_rounds: int = 100
) -> tuple[float, NDArray[np.int64], Rows]:
    """Sum of squared distances to the centres, the group of each row, and the centres, from one k-means++ start.

    Lloyd's rounds, until nothing changes or `most_rounds` are done. Source: Arthur and Vassilvitskii 2007.
    """
    centre_CD = _spread_rows(rows_ND, number, random)
    group_N = np.full(len(rows_ND), -1)
    for _ in range(most_rounds):
        nearest_N, distance_N = nearest(rows_ND, centre_CD)
        if (nearest_N == group_N).all():
            break
        group_N = nearest_N
        order_N = np.argsort(group_N, kind="stable")
        used, first = np.unique(group_N[order_N], return_index=True)
        size = np.diff(np.append(first, len(rows_ND)))
        centre_CD[used] = np.add.reduceat(rows_ND[order_N], first) / size[:, None]
    return float(distance_N.sum()), group_N, centre_CD


def nearest(rows_ND: Rows, centre_CD: Rows) -> tuple[NDArray[np.int64], Rows]:
    """The nearest centre of each row, and the squared distance to it."""
    blocks = [squared_distances(rows_ND[at : at + _BLOCK], centre_CD) for at in range(0, len(rows_ND), _BLOCK)]
    return np.concatenate([b.argmin(axis=1) for b in blocks]), np.concatenate([b.min(axis=1) for b in blocks])


def squared_distances(one_ND: Rows, other_MD: Rows) -> Rows:
    """Squared Euclidean distance of each row to each other row, [N, M]."""
    squares_NM = np.square(one_ND).sum(axis=1)[:, None] + np.square(other_MD).sum(axis=1)
    return np.asarray(np.maximum(squares_NM - 2 * one_ND @ other_MD.T, 0.0))


def _spread_rows(rows_ND: Rows, number: int, random: np.random.Generator) -> Rows:
    """Rows to start from: each further one is drawn by its squared distance to those before (k-means++)."""
    chosen = [int(random.integers(len(rows_ND)))]
    nearest_N = squared_distances(rows_ND, rows_ND[chosen])[:, 0].astype(np.float64)
    for _ in range(number - 1):
        total = nearest_N.sum()
        chance_N = nearest_N / total if total > 0 else np.full(len(rows_ND), 1 / len(rows_ND))
        chosen.append(int(random.choice(len(rows_ND), p=chance_N)))
        nearest_N = np.minimum(nearest_N, squared_distances(rows_ND, rows_ND[chosen[-1:]])[:, 0])
    return rows_ND[chosen]
