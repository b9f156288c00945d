"""Profiles: measured tables of kernels, as files of ours and as others publish them."""

from __future__ import annotations

from pathlib import Path

from moesim.files.profiles.aiconfigurator import import_aiconfigurator
from moesim.files.profiles.imported import Imported
from moesim.files.profiles.infersim import import_infersim

IMPORTERS = {"aiconfigurator": import_aiconfigurator, "infersim": import_infersim}


def import_profiles(directory: Path, format_name: str | None = None) -> Imported:
    """The tables under `directory`, in the layout of that name; told from the files where it is None.

    Raises:
        ValueError: there is no such folder, or nothing in it that could be read.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder; give the one that holds the tables")
    if format_name is None:
        format_name = "aiconfigurator" if any(directory.glob("*/*/*/*/*.parquet")) else "infersim"
    return IMPORTERS[format_name](directory)
