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
    """Import the measured tables under DIRECTORY, one Parquet file for each source table.

    aiconfigurator: [data/]SYSTEM/FAMILY/BACKEND/VERSION/TABLE.parquet. infersim: OPERATOR/[PHASE/]DEVICE/FILE.csv.
    """
    from moesim.files.profiles import import_profiles
    from moesim.files.profiles.tables import write_tables

    found = import_profiles(directory, format_name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out}: cannot make the folder: {error.strerror}; choose a writable place") from error
    for line in found.read:
        click.echo(f"read: {line}", err=True)
    for line in found.left_out:
        click.echo(f"left out: {line}", err=True)
    for name, tables in found.tables.items():
        if tables:
            write_tables(tables, out / f"{name}.parquet")
            points = sum(len(table.seconds_N) for table in tables)
            click.echo(f"{out / name}.parquet: {points} points in {len(tables)} tables of {tables[0].device}")
