"""Text sources: reading them, and saying what is wrong in their lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesim.files.tables import raise_all

MAX_MISTAKES = 20


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text in UTF-8 ({error})") from error


def first_line(path: Path) -> str:
    """The first line of a text file that is not blank; "" where there is none.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            return next((line for line in file if line.strip()), "")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text in UTF-8 ({error})") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: it cannot be read, or is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); write it again") from error


def raise_first(path: Path, mistakes: Sequence[str]) -> None:
    """One ValueError with the first mistakes, and how many more there are, if there is any."""
    more = len(mistakes) - MAX_MISTAKES
    raise_all(str(path), [*mistakes[:MAX_MISTAKES], *([f"and {more} more"] if more > 0 else [])])
