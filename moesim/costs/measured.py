"""Measured tables of kernels, and seconds from them between the points that were measured.

A time is split in two: a roofline with a launch floor, fitted to the table (four constants), and the ratio of the
measured time to it. The logarithm of the ratio is interpolated, multilinearly in the logarithms of the coordinates.
Outside of what was measured the ratio is that of the border, so that a time goes on growing as its work does, and the
answer says that it is outside.

The interval is the table's own: every point that has neighbours on both sides along an axis is predicted from those
two, and the errors made so give each point and axis a scale, and the table a factor that makes nine in ten of them fall
inside (conformal prediction: Lei and others, Distribution-Free Predictive Inference for Regression, JASA 2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.costs.ragged import RaggedGrid, Stencil, neighbours
from moesim.costs.roofline_fit import FittedRoofline, fit_roofline
from moesim.costs.work import Coordinates, work

Floats = NDArray[np.float64]

COVERAGE = 0.9
P80_TO_P95 = 1.645 / 0.8416
"""From the distance of p80 from the median to that of p95, for a normal spread."""
CHUNK = 16384
"""Queries looked up at once: a query between points on D axes becomes 2^D rows."""


class Interpolated(NamedTuple):
    """Answers of a table, [M] each: seconds, ends of a 90 % interval, and whether it lies within what was measured."""

    seconds: Floats
    low: Floats
    high: Floats
    inside: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class MeasuredTable:
    """Times of one operator in one format on one device, at N points with D coordinates.

    Attributes:
        op: "gemm", "moe", "context_attention", ...: a name that `moesim.costs.work` knows, or any other.
        dtype: format of the weights (of the cache in decode attention, of the elements in a collective).
        device: name of the device.
        axes: names of the coordinates, D of them.
        points_ND: coordinates, all positive, no two points alike.
        seconds_N: medians.
        low_N, high_N: 20th and 80th percentiles of each point's repetitions, where known.
        facts: what is the same in all rows: backend, kernel, distribution, window, ...
        provenance: where it comes from: source, licence, versions, date.

    Raises:
        ValueError: shapes, values or names break these rules.
    """

    op: str
    dtype: str
    device: str
    axes: tuple[str, ...]
    points_ND: Floats
    seconds_N: Floats
    low_N: Floats | None = None
    high_N: Floats | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if found := self.mistakes():
            raise ValueError(f"measured table of {self.op} in {self.dtype} on {self.device}: {'; '.join(found)}")

    def mistakes(self) -> list[str]:
        """Every rule that the table breaks, in words."""
        shape = (len(self.seconds_N), len(self.axes))
        if self.points_ND.shape != shape or not all(shape):
            given = " x ".join(str(side) for side in self.points_ND.shape)
            return [f"points must be rows x axes = {shape[0]} x {shape[1]}, at least 1 x 1; given {given}"]
        found = []
        for name, values in (("coordinates", self.points_ND), ("seconds", self.seconds_N)):
            wrong = ~(np.isfinite(values) & (values > 0))
            if wrong.any():
                row = int(np.argwhere(wrong)[0][0])
                found.append(f"{name} must be positive and finite; given {values[row].tolist()} in row {row}")
        if len(np.unique(self.points_ND, axis=0)) < len(self.points_ND):
            found.append("two rows have the same coordinates; merge them, or tell them apart by a fact")
        if (self.low_N is None) != (self.high_N is None):
            found.append("p20 and p80 go together; give both or neither")
        if self.low_N is not None and self.high_N is not None:
            wrong = ~((self.low_N > 0) & (self.low_N <= self.seconds_N) & (self.seconds_N <= self.high_N))
            if wrong.any():
                found.append(f"0 < p20 <= p50 <= p80 must hold; broken in row {int(wrong.argmax())}")
        return found

    def coordinates(self) -> Coordinates:
        """The points by name of the axis, [N] each."""
        return dict(zip(self.axes, self.points_ND.T, strict=True))

    @cached_property
    def roofline(self) -> FittedRoofline:
        """The shape that the table is interpolated against."""
        return fit_roofline(*work(self.op, self.dtype, self.coordinates()), self.seconds_N)

    @cached_property
    def _log_ND(self) -> Floats:
        return np.log(self.points_ND)

    @cached_property
    def _ratio_N(self) -> Floats:
        """log(measured / roofline)."""
        return np.log(self.seconds_N / self.roofline.seconds(*work(self.op, self.dtype, self.coordinates())))

    @cached_property
    def _grid(self) -> RaggedGrid:
        return RaggedGrid(self._log_ND)

    @cached_property
    def _far(self) -> float:
        """Half width outside of what was measured: how far nine in ten points are from the table's usual ratio."""
        return float(np.percentile(np.abs(self._ratio_N - np.median(self._ratio_N)), 90))

    @cached_property
    def _noise_N(self) -> Floats:
        """Half width of the measurement's own spread, in logarithms."""
        if self.low_N is None or self.high_N is None:
            return np.zeros(len(self.seconds_N))
        return np.asarray(np.log(self.high_N / self.low_N) / 2 * P80_TO_P95)

    @cached_property
    def _spread(self) -> tuple[Floats, float]:
        """Scale of the error at each point along each axis, [N, D], and the factor that makes 90 % of them fit."""
        N, D = self.points_ND.shape
        scale_ND, ratios = np.full((N, D), np.nan), []
        for axis in range(D):
            point, below, above, part = neighbours(self._log_ND, axis)
            if not len(point):
                continue
            error = np.abs(self._ratio_N[point] - (1 - part) * self._ratio_N[below] - part * self._ratio_N[above])
            scale_ND[point, axis] = error
            usual = float(np.median(error))
            around = (
                np.nanmean(np.c_[scale_ND[[below, above], axis].T, np.full(len(point), usual)], axis=1) + 0.5 * usual
            )
            ratios.append(error / np.maximum(around, 1e-12))
            missing = np.isnan(scale_ND[:, axis])
            scale_ND[missing, axis] = np.percentile(error, 75)
            scale_ND[:, axis] = (scale_ND[:, axis] + usual) / 2 + 0.5 * usual
        far = float(np.percentile(np.abs(self._ratio_N), 90))
        scale_ND[:, np.isnan(scale_ND).all(axis=0)] = far  # an axis with nothing to learn from
        return scale_ND, float(np.quantile(np.concatenate(ratios), COVERAGE)) if ratios else 1.0

    def seconds(
        self, coordinates: Mapping[str, ArrayLike], amount: tuple[Floats, Floats] | None = None
    ) -> Interpolated:
        """Seconds at M points.

        Args:
            coordinates: for each axis its values; they broadcast against each other.
            amount: FLOP and bytes of each call, [M] each, where they are not those that the coordinates say: the
                roofline is taken at these, and the ratio at the coordinates. For uneven loads.

        Raises:
            ValueError: an axis lacks, is not of the table, or has values that are not positive.
        """
        if set(coordinates) != set(self.axes):
            raise ValueError(
                f"table of {self.op} in {self.dtype} on {self.device}: coordinates must be {', '.join(self.axes)}; "
                f"given {', '.join(coordinates) or 'none'}"
            )
        arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(coordinates[name], np.float64)) for name in self.axes))
        flat = {name: array.ravel() for name, array in zip(self.axes, arrays, strict=True)}
        for name, values in flat.items():
            if not (values > 0).all():
                raise ValueError(f"table of {self.op}: {name} must be positive; given {values[~(values > 0)][0]}")
        base = self.roofline.seconds(*(amount or work(self.op, self.dtype, flat)))
        query_MD = np.log(np.stack(list(flat.values()), axis=1))
        parts = [self._between(query_MD[start : start + CHUNK]) for start in range(0, len(query_MD), CHUNK)]
        ratio, half, inside = (np.concatenate(column) for column in zip(*parts, strict=True))
        shape = arrays[0].shape
        ends = [(base * np.exp(ratio + sign * half)).reshape(shape) for sign in (0, -1, 1)]
        return Interpolated(ends[0], ends[1], ends[2], inside.reshape(shape))

    def _between(self, query_MD: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """log ratio, half width of its interval, and whether inside, [M] each."""
        stencil: Stencil = self._grid.locate(query_MD)
        scale_ND, factor = self._spread
        squares = [stencil.between_MD[:, axis] * stencil.mix(scale_ND[:, axis]) ** 2 for axis in range(len(self.axes))]
        half = factor * np.sqrt(np.sum(squares, axis=0))
        half = np.where(stencil.inside_M, half, np.maximum(half, self._far)) + stencil.mix(self._noise_N)
        return stencil.mix(self._ratio_N), half, stencil.inside_M


class MeasuredTables:
    """The tables of one device.

    >>> tables = MeasuredTables([MeasuredTable("copy", "bf16", "x", ("size",), np.array([[1.0], [4.0]]), np.ones(2))])
    >>> tables.seconds("copy", "bf16", {"size": [1.0, 2.0]}).seconds.round(2).tolist()
    [1.0, 1.0]
    """

    def __init__(self, tables: list[MeasuredTable] | tuple[MeasuredTable, ...] = ()) -> None:
        self.tables = tuple(tables)

    def find(self, op: str, dtype: str, **facts: str) -> MeasuredTable | None:
        """The table of that operator and format whose facts are those named: the one with most rows, else None."""
        found = [
            table
            for table in self.tables
            if (table.op, table.dtype) == (op, dtype) and facts.items() <= dict(table.facts).items()
        ]
        return max(found, key=lambda table: len(table.seconds_N), default=None)

    def __contains__(self, op_and_dtype: tuple[str, str]) -> bool:
        return self.find(*op_and_dtype) is not None

    def seconds(self, op: str, dtype: str, coordinates: Mapping[str, ArrayLike], **facts: str) -> Interpolated:
        """Seconds at M points, with their interval and whether they lie inside; see `MeasuredTable.seconds`.

        Raises:
            ValueError: there is no such table, or the coordinates are not its.
        """
        table = self.find(op, dtype, **facts)
        if table is None:
            known = sorted({f"{table.op} in {table.dtype}" for table in self.tables})
            asked = "".join(f", {name} {value}" for name, value in facts.items())
            raise ValueError(f"no measured table of {op} in {dtype}{asked}; there are: {', '.join(known) or 'none'}")
        return table.seconds(coordinates)
