"""Plain values as dataclasses, read strictly: unknown keys, missing keys and wrong types are all found in one go."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

from moesim.files.keys import nearest

T = TypeVar("T")


def structure(cls: type[T], values: Any, where: str, mistakes: list[str]) -> T | None:
    """A dataclass from a table; unknown keys, missing keys and wrong types are added to `mistakes`."""
    if not isinstance(values, dict):
        mistakes.append(f"{where}: must be a table, not {values!r}")
        return None
    before = len(mistakes)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    mistakes += [f"{where}.{key}: unknown key; {nearest(key, fields)}" for key in values if key not in fields]
    built: dict[str, Any] = {}
    for name, item in fields.items():
        if name not in values:
            if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                mistakes.append(f"{where}.{name}: is missing; give {_wanted(hints[name])}")
            continue
        value, hint = values[name], hints[name]
        item_hint = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
        if dataclasses.is_dataclass(hint):
            built[name] = structure(typing.cast(type, hint), value, f"{where}.{name}", mistakes)
        elif dataclasses.is_dataclass(item_hint):
            built[name] = _several(typing.cast(type, item_hint), value, f"{where}.{name}", mistakes)
        elif _fits(value, hint):
            built[name] = value
        else:
            mistakes.append(f"{where}.{name}: must be {_wanted(hint)}, not {value!r}")
    return None if len(mistakes) > before else cls(**built)


def _several(cls: type[T], values: Any, where: str, mistakes: list[str]) -> tuple[T | None, ...]:
    """Dataclasses from an array of tables."""
    if not isinstance(values, list):
        mistakes.append(f"{where}: must be an array of tables, [[{where}]], not {values!r}")
        return ()
    return tuple(structure(cls, value, f"{where}[{i}]", mistakes) for i, value in enumerate(values))


def _options(hint: Any) -> tuple[type, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, bool):
        return bool in _options(hint)
    kinds = tuple((int, float) if kind is float else (typing.get_origin(kind) or kind,) for kind in _options(hint))
    return isinstance(value, tuple(k for group in kinds for k in group))


def _wanted(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
        type(None): "nothing",
    }
    return " or ".join(names.get(kind, "a table") for kind in _options(hint))
