"""Reading the keys of a configuration so that every mistake in it is found in one go.

`Keys` answers typed questions ("the whole number under one of these names"). A wrong answer is written down
as a mistake and replaced by a harmless stand-in, so reading goes on; the reader raises once, at the end.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

Names = str | Sequence[str]


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say about an unknown name: the names closest to it, then all of them.

    >>> nearest("mixtrl", ["mixtral", "olmoe"])
    "nearest: 'mixtral'; known: mixtral, olmoe"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(map(repr, close))}; " if close else ""
    return f"{hint}known: {', '.join(names)}"


class Keys:
    """The keys of one configuration file, and the mistakes found in them so far.

    values: the parsed JSON or TOML object. Where several names are asked for, the first that is there is used
    (families and library versions call one fact differently); a null counts as not there.
    """

    def __init__(self, values: Mapping[str, object]) -> None:
        self.values = values
        self.mistakes: list[str] = []
        self.asked: set[str] = set()
        self._bad: set[str] = set()

    def blame(self, key: str, rule: str) -> None:
        """Write down one mistake: the key, the rule it breaks, what was given and what would do."""
        self._bad.add(key)
        mistake = f"{key}: {rule}"
        if mistake not in self.mistakes:
            self.mistakes.append(mistake)

    def name_of(self, names: Names) -> str:
        """The one of `names` that the file uses, else the first."""
        options = (names,) if isinstance(names, str) else tuple(names)
        self.asked.update(options)
        return next((name for name in options if self.values.get(name) is not None), options[0])

    def has(self, names: Names) -> bool:
        """Whether one of the names is there with a value."""
        return self.values.get(self.name_of(names)) is not None

    def sound(self, names: Names) -> bool:
        """Whether nothing was found wrong with this key so far."""
        return self.name_of(names) not in self._bad

    def count(self, names: Names, default: int | None = None, minimum: int = 1, maximum: int = 10**15) -> int:
        """A whole number in [minimum, maximum]; required where there is no default."""
        key = self.name_of(names)
        value = self.values.get(key)
        kind = f"a whole number, at least {minimum}"
        if isinstance(value, int) and value > maximum:
            kind = f"a whole number, at most {maximum}"
        if value is None:
            if default is not None:
                return default
            self.blame(key, f"is missing; give {kind}")
        elif isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self.blame(key, f"must be {kind}, not {value!r}")
        else:
            return value
        return max(minimum, 1)

    def count_or_none(self, names: Names) -> int | None:
        """A whole number of at least 1, or None where the file has none."""
        return self.count(names) if self.has(names) else None

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(self.name_of(name))
        if value is None:
            return default
        if not isinstance(value, bool):
            self.blame(name, f"must be true or false, not {value!r}")
            return default
        return value

    def text(self, names: Names, default: str = "") -> str:
        """A string."""
        key = self.name_of(names)
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.blame(key, f"must be a string, not {value!r}")
            return default
        return value

    def counts(self, name: str, minimum: int, below: int | None = None) -> list[int] | None:
        """A list of whole numbers in [minimum, below), or None where the file has none."""
        value = self.values.get(self.name_of(name))
        if value is None:
            return None
        span = f"at least {minimum}" if below is None else f"from {minimum} to {below - 1}"
        whole = isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
        if not whole:
            self.blame(name, f"must be a list of whole numbers {span}, not {value!r}")
            return None
        assert isinstance(value, list)
        out = [x for x in value if x < minimum or (below is not None and x >= below)]
        if out:
            self.blame(name, f"must hold whole numbers {span}, but it has {out[:5]}")
            return None
        return [int(x) for x in value]

    def words(self, name: str, length: int, known: Iterable[str], per: Names) -> list[str] | None:
        """A list of `length` strings out of `known`, or None where the file has none.

        per: the key that the length comes from; where that is wrong, there is no telling about the list.
        """
        value = self.values.get(self.name_of(name))
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            self.blame(name, f"must be a list of strings, not {value!r}")
            return None
        if not self.sound(per):
            return None
        if len(value) != length:
            rule = f"must have one entry for each of {self.name_of(per)} ({length}), but it has {len(value)}"
            self.blame(name, rule)
            return None
        known = tuple(known)
        odd = sorted(set(value) - set(known))
        if odd:
            self.blame(name, f"has the unknown entry {odd[0]!r}; {nearest(odd[0], known)}")
            return None
        return list(value)

    def table(self, name: str) -> Keys:
        """The keys of an object inside this one; its mistakes are reported as `name.key`."""
        value = self.values.get(self.name_of(name))
        if value is not None and not isinstance(value, dict):
            self.blame(name, f"must be an object of keys and values, not {value!r}")
        return Keys(value if isinstance(value, dict) else {})

    def take(self, other: Keys, prefix: str) -> None:
        """Adopt the mistakes of an inner table."""
        self.mistakes += [f"{prefix}.{mistake}" for mistake in other.mistakes]

    def reject_unused(self, allowed: Iterable[str] = ()) -> None:
        """Call every key with a value that no question asked for a mistake, but for those allowed."""
        meaningful = self.asked.union(allowed)
        for key, value in self.values.items():
            if key not in meaningful and value is not None:
                self.blame(key, f"has no meaning for this model; {nearest(key, meaningful)}")

    def require(self, holds: bool, names: Sequence[Names], rule: str) -> None:
        """Check a rule over several keys, unless one of them is wrong by itself already."""
        keys = [self.name_of(name) for name in names]
        if not holds and not self._bad.intersection(keys):
            self.blame(keys[0], rule)
