"""Telling people what a run found: tables for the terminal, one HTML page, a timeline for Perfetto.

A report is written whole or not at all: under a temporary name in the folder it is meant for, then renamed.
"""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_target(path: str | Path) -> None:
    """Refuse a path that no report can be written to, before any work is done for it.

    Raises:
        ValueError: it is a folder, or its folder does not exist.
    """
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"report: {str(target)!r} is a folder; give the name of a file in it")
    if not target.parent.is_dir():
        raise ValueError(f"report: cannot write {str(target)!r}: there is no folder {str(target.parent)!r}")


def replace_file(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` in one step, so that no reader and no crash ever sees half a report."""
    check_target(path)
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_figure(figure: Figure, path: str | Path) -> None:
    """A picture as a file of the kind that its name ends in (.png, .svg, .pdf)."""
    content = BytesIO()
    figure.savefig(content, format=Path(path).suffix.removeprefix(".") or "png", dpi=150)
    replace_file(path, content.getvalue())
