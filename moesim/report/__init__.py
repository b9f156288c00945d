"""Telling people what a run found: tables for the terminal, one HTML page, a timeline for Perfetto.

A report is written whole or not at all: under a temporary name in the folder it is meant for, then renamed.
"""

from __future__ import annotations

import os
from pathlib import Path


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
