"""`moesim trace check`: every mistake of trace files."""

from __future__ import annotations

from pathlib import Path

import click

from moesim.cli.check import check_all, say_trace


@click.command("check")
@click.argument("traces", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="TRACE...")
def check_command(traces: tuple[Path, ...]) -> None:
    """Read every TRACE in full and report all of its mistakes, each with column and row.

    Exits with 2 if any file has one.
    """
    check_all(traces, say_trace)
