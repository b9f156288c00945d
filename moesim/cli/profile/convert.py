"""`moesim profile import`: tables that others measured, as profiles of ours."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("import")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write the profiles to.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["aiconfigurator", "infersim"]),
    help="Told from the files where not given.",
)
def import_command(directory: Path, out: Path, format_name: str | None) -> None:
    """Import the measured tables under DIRECTORY, one Parquet file for each source table, in a folder of each device.

    aiconfigurator: [data/]SYSTEM/FAMILY/BACKEND/VERSION/TABLE.parquet. infersim: OPERATOR/[PHASE/]DEVICE/FILE.csv.
    """
    from moesim.files.profiles import import_profiles
    from moesim.files.profiles.tables import write_tables

    found = import_profiles(directory, format_name)
    for line in found.read:
        click.echo(f"read: {line}", err=True)
    for line in found.left_out:
        click.echo(f"left out: {line}", err=True)
    for name, tables in found.tables.items():
        if tables:
            path = out / f"{name}.parquet"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                because = f"cannot make the folder: {error.strerror}; choose a writable place"
                raise ValueError(f"{path.parent}: {because}") from error
            write_tables(tables, path)
            points = sum(len(table.seconds_N) for table in tables)
            click.echo(f"{path}: {points} points in {len(tables)} tables of {tables[0].device}")
