"""Profiles: measured tables of kernels, as files of ours and as others publish them."""

from __future__ import annotations

from pathlib import Path

from moesim.costs.measured import MeasuredTables
from moesim.files.profiles.aiconfigurator import files_of_systems, import_aiconfigurator
from moesim.files.profiles.imported import Imported
from moesim.files.profiles.infersim import import_infersim
from moesim.files.profiles.tables import load_profile

IMPORTERS = {"aiconfigurator": import_aiconfigurator, "infersim": import_infersim}


def import_profiles(directory: Path, format_name: str | None = None) -> Imported:
    """The tables under `directory`, in the layout of that name; told from the files where it is None.

    Raises:
        ValueError: there is no such folder, or nothing in it that could be read.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder; give the one that holds the tables")
    if format_name is None:
        found = {"aiconfigurator": files_of_systems(directory), "infersim": directory.rglob("*.csv")}
        format_name = next((name for name, files in found.items() if any(files)), None)
    if format_name is None:
        raise ValueError(
            f"{directory}: no SYSTEM/FAMILY/BACKEND/VERSION/TABLE.parquet and no OPERATOR/[PHASE/]DEVICE/FILE.csv; "
            "give the folder that holds the tables"
        )
    return IMPORTERS[format_name](directory)


def tables_of_device(path: Path, device: str, names: tuple[str, ...] = ()) -> MeasuredTables:
    """One device's tables in profiles of ours (a file or folder), or in aiconfigurator's folder; there, of these names.

    Raises:
        ValueError: there are none of that device, or a file has mistakes.
    """
    if any(files_of_systems(path)):
        imported = import_aiconfigurator(path, (device,), names).tables.values()
        found = MeasuredTables([table for tables in imported for table in tables])
    else:
        found = load_profile(path, device)
    if not found.tables:
        raise ValueError(f"{path}: no measured table of {device} in it; give a folder that has one")
    return found
