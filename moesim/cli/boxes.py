"""What `moesim run` does with a box file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click


def run_box(path: Path, changes: Sequence[str], as_json: bool, report: Path | None) -> None:
    """Try every model and set of policies, write the picture that was asked for, print tables or JSON.

    Raises:
        ValueError: the file has mistakes, or the report is not a picture.
    """
    from rich.console import Console
    from rich.progress import Progress

    from moesim.boxes import fit_box
    from moesim.files.boxes import UPGRADES, load_box
    from moesim.report import check_target
    from moesim.report.box import box_tables, write_box_figure

    if report:
        check_target(report)
        if report.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--report {report}: what fits a box is a picture; give a .png, .svg or .pdf")
    box = load_box(path, changes)
    total = len(box.models) * (len(box.systems) + len(UPGRADES))
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("trying", total=total)
        fits = fit_box(box, lambda: progress.advance(bar))
    if report:
        write_box_figure(fits, report)
        click.echo(f"report: {report}", err=True)
    if as_json:
        click.echo(json.dumps({"box": dict(box.plain), "fits": [fit.as_json() for fit in fits]}, indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for table in box_tables(fits):
        console.print(table)
    console.print(f"helps most: {'; '.join(f'{name}: {words}' for name, words in UPGRADES.items())}", style="dim")
    share = f"{box.stickiness:.0%} of a token's experts are those of the token before"
    console.print(f"The routing is made up: {share}.", style="dim")
