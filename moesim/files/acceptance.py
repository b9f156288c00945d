"""Measured acceptance of drafts: InferenceX's golden curves, and what chances a mean acceptance length stands for.

A file maps a model, a thinking mode and a number of drafts to the mean tokens that one iteration brings. Only that
shape of YAML is read, so that no library is needed: three levels of keys, two spaces each, numbers at the leaves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesim.files.keys import nearest
from moesim.files.tables import raise_all

_LINE = re.compile(r"(?P<indent> *)(?P<key>[^\s:#][^:#]*?)\s*:(?:\s+(?P<value>[^\s#]+))?\s*(?:#.*)?$")


@dataclass(frozen=True)
class AcceptanceCurves:
    """Mean tokens of an iteration (accepted drafts and the one that is always right), by model, mode and drafts.

    Attributes:
        path: the file, for messages.
        length: (model, thinking mode, drafts) -> acceptance length.
    """

    path: str
    length: Mapping[tuple[str, str, int], float]

    def find(self, num_speculative_tokens: int, mode: str | None = None, model: str | None = None) -> float:
        """The acceptance length of one cell; mode and model may be left out where the file has only one.

        Raises:
            ValueError: the file has no such cell.
        """
        model = self._one("model", {m for m, _, _ in self.length}, model)
        mode = self._one("mode", {k for m, k, _ in self.length if m == model}, mode)
        drafts = sorted(n for m, k, n in self.length if (m, k) == (model, mode))
        if num_speculative_tokens not in drafts:
            raise ValueError(
                f"{self.path}: {model}, {mode} has no acceptance length for {num_speculative_tokens} speculative"
                f" tokens; it has {', '.join(map(str, drafts))}"
            )
        return self.length[model, mode, num_speculative_tokens]

    def _one(self, what: str, known: set[str], name: str | None) -> str:
        if name is None and len(known) == 1:
            return next(iter(known))
        if name not in known:
            given = f"no {what} {name!r}" if name else f"several of a {what}, and none is named"
            raise ValueError(f"{self.path}: {given}; {nearest(name or '', known)}")
        return name


def read_acceptance(path: str | Path) -> AcceptanceCurves:
    """The curves of one golden acceptance-length file (InferenceX, golden_al_distribution/*.yaml).

    Raises:
        ValueError: no such file, or lines that are not of that shape; all are listed with their number.
    """
    path = Path(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; give a YAML file of acceptance lengths") from error
    mistakes: list[str] = []
    found: dict[tuple[str, str, int], float] = {}
    model = mode = ""
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line)
        level = len(match["indent"]) if match else -1
        if match and level == 0 and match["value"] is None:
            model, mode = match["key"], ""
        elif match and level == 2 and match["value"] is None and model:
            mode = match["key"]
        elif match and level == 4 and match["value"] is not None and mode:
            mistakes += _put(found, (model, mode), match["key"], match["value"], f"line {number}")
        else:
            mistakes.append(
                f"line {number}: must be 'model:', '  mode:' or '    drafts: length' below those, not {line!r}"
            )
    if not found and not mistakes:
        mistakes.append("has no acceptance length; it must hold a model, a thinking mode, and 'drafts: length' in it")
    raise_all(str(path), mistakes)
    return AcceptanceCurves(str(path), found)


def _put(
    found: dict[tuple[str, str, int], float], cell: tuple[str, str], drafts: str, length: str, where: str
) -> list[str]:
    if not drafts.isascii() or not drafts.isdigit() or int(drafts) < 1:
        return [f"{where}: drafts must be a whole number, at least 1, not {drafts!r}"]
    key = (*cell, int(drafts))
    try:
        value = float(length)
    except ValueError:
        return [f"{where}: a length must be a number from 1 to drafts + 1, not {length!r}"]
    if not 1 <= value <= key[2] + 1:
        return [f"{where}: a length must be from 1 to drafts + 1 = {key[2] + 1}, given {length}"]
    if key in found:
        return [f"{where}: {' '.join(cell)} {drafts} is there twice; keep one"]
    found[key] = value
    return []


def chances_by_position(acceptance_length: float, num_speculative_tokens: int) -> Sequence[float]:
    """Chance that each draft is accepted, given that those before it were, [drafts].

    All full tokens of the length are certain, the next one takes its fraction: no other schedule with this mean varies
    less. Source: vLLM's synthetic rejection sampler (vllm/config/speculative.py, pull request 40662).

    >>> chances_by_position(3.5, 5)
    (1.0, 1.0, 0.5, 0.0, 0.0)

    Raises:
        ValueError: a length that so many drafts cannot have.
    """
    _check(acceptance_length, num_speculative_tokens)
    accepted = acceptance_length - 1
    return tuple(min(1.0, max(0.0, accepted - place)) for place in range(num_speculative_tokens))


def constant_rate(acceptance_length: float, num_speculative_tokens: int) -> float:
    """The chance a, alike for every draft, with 1 + a + ... + a^k = length; to 1e-12, by halving.

    Source: Leviathan et al. (arXiv 2211.17192), equation 1.

    >>> round(constant_rate(1.7, 1), 9)
    0.7

    Raises:
        ValueError: a length that so many drafts cannot have.
    """
    _check(acceptance_length, num_speculative_tokens)
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        if sum(middle**place for place in range(num_speculative_tokens + 1)) < acceptance_length:
            low = middle
        else:
            high = middle
    return high if acceptance_length > 1 else 0.0


def _check(acceptance_length: float, num_speculative_tokens: int) -> None:
    if num_speculative_tokens < 0 or not 1 <= acceptance_length <= num_speculative_tokens + 1:
        raise ValueError(
            f"acceptance_length must be from 1 to num_speculative_tokens + 1 = {num_speculative_tokens + 1},"
            f" given {acceptance_length}"
        )
