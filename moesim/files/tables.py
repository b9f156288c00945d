"""A TOML file as tables that answer typed questions and find every mistake in one go.

A reader never stops at the first mistake. It writes each one down (file, key, rule, what was given, what
would do), puts a harmless stand-in in its place, and raises one ValueError at the end.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeGuard

from moesim.files.keys import nearest
from moesim.hardware import SOURCES

TAGS = tuple(f"{source}: " for source in SOURCES)
"""How a sentence under [sources] starts."""


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Table:
    """One table of a TOML file; its mistakes go into a list that the whole file shares."""

    def __init__(self, where: str, values: Mapping[str, object], mistakes: list[str], prefix: str = "") -> None:
        self.where, self.values, self.mistakes, self.prefix = where, values, mistakes, prefix

    def blame(self, key: str, rule: str) -> None:
        """Write down one mistake."""
        self.mistakes.append(f"{self.where}: {self.prefix}{key} {rule}")

    def only(self, known: Iterable[str]) -> None:
        """Every key must be one of `known`."""
        for key in self.values:
            if key not in known:
                self.blame(key, f"is not a key of this file; {nearest(key, known)}")

    def number(self, key: str, default: float | None = None, example: str = "3.35e12") -> float:
        """A positive number; required where there is no default."""
        value = self.values.get(key, default)
        if value is None:
            self.blame(key, f"is missing; give a positive number, such as {example}")
        elif not _is_number(value) or not (0 < value < math.inf or value == default):
            self.blame(key, f"must be a positive number, such as {example}, not {value!r}")
        else:
            return float(value)
        return 1.0

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1, required where there is no default; 0 stands for a mistake."""
        value = self.values.get(key, default)
        if value is None:
            self.blame(key, "is missing; give a whole number, at least 1")
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.blame(key, f"must be a whole number, at least 1, not {value!r}")
        else:
            return value
        return 0

    def text(self, key: str, known: Iterable[str] = ()) -> str:
        """A string that is not empty; one of `known` where that is given."""
        value = self.values.get(key)
        hint = f"; one of {', '.join(known)}" if known else ""
        if value is None:
            self.blame(key, f"is missing; give a string{hint}")
        elif not isinstance(value, str) or not value.strip():
            self.blame(key, f"must be a string that is not empty, not {value!r}{hint}")
        elif known and value not in known:
            self.blame(key, f"must not be {value!r}; {nearest(value, known)}")
        else:
            return value
        return ""

    def table(self, key: str, required: bool = True) -> Table:
        """The table under a key; empty where it is absent."""
        value = self.values.get(key)
        if value is None and required:
            self.blame(key, f"is missing; give a table [{self.prefix}{key}]")
        elif value is not None and not isinstance(value, dict):
            self.blame(key, f"must be a table of keys and values, not {value!r}")
        return Table(self.where, value if isinstance(value, dict) else {}, self.mistakes, f"{self.prefix}{key}.")

    def tables(self, key: str) -> list[Table]:
        """The tables of an array `[[key]]`, each known by its place in the file, counted from 0."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            self.blame(key, f"must be an array of tables [[{key}]], not {value!r}")
            return []
        return [Table(self.where, entry, self.mistakes, f"{self.prefix}{key}[{i}].") for i, entry in enumerate(value)]

    def source_of(self, groups: Iterable[str]) -> Mapping[str, str]:
        """The table [sources]: a tagged sentence for each of the groups of numbers that the file has."""
        if "sources" not in self.values:
            wanted = ", ".join(groups)
            self.blame(
                "sources",
                f"is missing; give a table [sources] that says for {wanted} where the numbers are from",
            )
            return {}
        table = self.table("sources")
        table.only(tuple(groups))
        for group in groups:
            said = table.text(group)
            if said and not any(said.startswith(tag) and said != tag for tag in TAGS):
                tags = ", ".join(repr(tag) for tag in TAGS)
                table.blame(group, f"must start with one of {tags} and then name the source, not {said!r}")
        return {group: str(said) for group, said in table.values.items()}


def read_table(where: str, source: Traversable, mistakes: list[str]) -> Table | None:
    """The whole of a TOML file, or None (and a mistake) where it cannot be read at all."""
    if source.is_dir():
        problem = "is a directory; give the path of a TOML file"
    elif not source.is_file():
        problem = "does not exist; give the path of a TOML file"
    else:
        try:
            values = tomllib.loads(source.read_text(encoding="utf-8"))
        except OSError as error:
            problem = f"cannot be read ({error.strerror}); give a TOML file that can"
        except UnicodeDecodeError as error:
            problem = f"is not a TOML file, which is UTF-8 text ({error})"
        except tomllib.TOMLDecodeError as error:
            problem = (
                f"is not valid TOML ({error}); mend that line, or the end of a file that was cut off: not whole TOML"
            )
        else:
            if values:
                return Table(where, values, mistakes)
            problem = "is empty; start from one of the files that come with moesim"
    mistakes.append(f"{where}: {problem}")
    return None


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file.

    Raises:
        ValueError: it is not there, a directory, empty, or not TOML.
    """
    mistakes: list[str] = []
    table = read_table(str(path), path, mistakes)
    if table is None:
        raise ValueError(mistakes[0])
    return dict(table.values)


def raise_all(what: str, mistakes: list[str]) -> None:
    """One ValueError with every mistake, if there is any."""
    if mistakes:
        number = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ValueError(f"{what}: {number}\n" + "\n".join(f"  - {mistake}" for mistake in mistakes))
