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
        kinds = {"aiconfigurator": "*.parquet", "infersim": "*.csv"}
        format_name = next((name for name, ending in kinds.items() if any(directory.rglob(ending))), None)
    if format_name is None:
        raise ValueError(
            f"{directory}: no SYSTEM/FAMILY/BACKEND/VERSION/TABLE.parquet and no OPERATOR/[PHASE/]DEVICE/FILE.csv; "
            "give the folder that holds the tables"
        )
    return IMPORTERS[format_name](directory)
