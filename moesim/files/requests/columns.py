"""Columns of a table as arrays, checked: what a row must hold, and which row does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST = 2**53  # whole numbers up to here are exact as float64


class Columns:
    """A table of N rows whose mistakes are gathered: one sentence for each broken rule of a column."""

    def __init__(self, table: pa.Table, mistakes: list[str]) -> None:
        self.table, self.mistakes = table, mistakes

    def numbers(self, name: str) -> Floats:
        """Numbers of any kind; text is read as numbers if it is."""
        column = self.table[name].combine_chunks()
        if pa.types.is_large_string(column.type) or pa.types.is_string(column.type):
            column = self._parsed(name, column)
        elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            self.mistakes.append(f"column {name} must hold numbers, given {column.type}; write one number in each row")
            return np.zeros(len(column))
        values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        self._blame(name, ~np.isfinite(values), values, "must be a number")
        return np.asarray(np.nan_to_num(values, posinf=0, neginf=0))

    def counts(self, name: str, least: int) -> Ints:
        """Whole numbers, `least` or more."""
        values = self.numbers(name)
        wrong = (values < least) | (values != np.floor(values)) | (values > MOST)
        if not any(mistake.startswith(f"column {name}") for mistake in self.mistakes):
            self._blame(name, wrong, values, f"must be a whole number, at least {least}")
        return np.where(wrong, 1, values).astype(np.int64)

    def seconds(self, name: str) -> Floats:
        """Seconds of dates, from the earliest."""
        column = self.table[name].combine_chunks()
        if not pa.types.is_timestamp(column.type):
            try:
                column = column.cast(pa.timestamp("ns"))
            except pa.ArrowException:
                self._bad_date(name, column)
                return np.zeros(len(column))
        if column.null_count:
            self._blame(name, column.is_null().to_numpy(zero_copy_only=False), None, "must be a date and time")
            return np.zeros(len(column))
        ns = column.cast(pa.timestamp("ns")).cast(pa.int64()).to_numpy()
        return (ns - ns.min()) / 1e9 if len(ns) else np.zeros(0)

    def lists(self, name: str) -> tuple[Ints, Ints]:
        """Lists of whole numbers as starts [N + 1] and values; text has them apart by spaces."""
        column = self.table[name].combine_chunks()
        nothing = np.zeros(len(column) + 1, np.int64), np.zeros(0, np.int64)
        if pa.types.is_null(column.type):
            return nothing
        if pa.types.is_integer(column.type):
            column = column.cast(pa.string())
        if pa.types.is_string(column.type):
            column = _split(column)
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            self.mistakes.append(f"column {name} must hold a list of whole numbers in each row, given {column.type}")
            return nothing
        lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        given = column.flatten()
        values = _whole(given)
        if values is None:
            wrong = [place for place, value in enumerate(given.to_pylist()) if _whole(pa.array([value])) is None]
            wrong_N = np.zeros(len(column), bool)
            wrong_N[np.searchsorted(starts, wrong, side="right") - 1] = True
            self._blame(name, wrong_N, wrong_N, "must hold whole numbers")
            return nothing
        return starts, values

    def refuse(self, name: str, wrong_N: NDArray[np.bool_], rule: str) -> None:
        """Call the rows where `wrong_N` holds mistakes, if there are any."""
        self._blame(name, wrong_N, wrong_N, rule)

    def _parsed(self, name: str, column: pa.Array) -> pa.Array:
        try:
            return column.cast(pa.float64())
        except pa.ArrowException:
            rows = [_number(text) for text in column.to_pylist()]
            self._blame(name, np.array([row is None for row in rows]), column, "must be a number")
            return pa.array([0.0 if row is None else row for row in rows])

    def _bad_date(self, name: str, column: pa.Array) -> None:
        for row, value in enumerate(column.to_pylist()):
            try:
                pa.array([value]).cast(pa.timestamp("ns"))
            except (pa.ArrowException, ValueError):
                self._said(name, row, value, "must be a date and time, such as 2023-11-16 18:17:03.97")
                return
        self.mistakes.append(f"column {name} must hold dates, given {column.type}")

    def _blame(self, name: str, wrong_N: NDArray[np.bool_], values: Any, rule: str) -> None:
        if wrong_N.any():
            row = int(wrong_N.argmax())
            given = self.table[name][row].as_py() if values is not None else None
            self._said(name, row, given, rule, int(wrong_N.sum()))

    def _said(self, name: str, row: int, given: object, rule: str, number: int = 1) -> None:
        others = f" (and {number - 1} more rows)" if number > 1 else ""
        shown = "nothing" if given is None or given == "" else repr(given)
        self.mistakes.append(f"column {name}, row {row + 1}: {rule}, given {shown}{others}; mend or leave out the row")


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _whole(values: pa.Array) -> Ints | None:
    """The same as whole numbers; None where one is none."""
    try:
        found = values.cast(pa.int64())
    except pa.ArrowException:
        return None
    return None if found.null_count else np.asarray(found.to_numpy(zero_copy_only=False))


def _split(column: pa.Array) -> pa.Array:
    """Lists from text such as "3 4 5"; empty text is an empty list."""
    trimmed = pc.utf8_trim_whitespace(column.fill_null(""))
    parts = pc.utf8_split_whitespace(trimmed)
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar([], parts.type), parts)
