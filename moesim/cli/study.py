"""`moesim study`: what papers say, and what moesim makes of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from moesim.study import Claim, Judged

WIDTH = 140
"""Columns of a pipe, and the most of a terminal."""
EXACT = 0.005
"""A tolerance below this is for rounding alone."""
STYLES = {"agrees": "green", "differs": "red", "untestable": "dim"}


@click.group("study")
def study_group() -> None:
    """Hold moesim against published systems: every claim agrees, differs, or cannot be tested."""


@study_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_command(as_json: bool) -> None:
    """List the studies, with what each asks."""
    from moesim.cli.list import print_rows, study_rows

    print_rows(study_rows(), as_json)


@study_group.command("run")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "all_studies", is_flag=True, help="Run every study.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def run_command(names: tuple[str, ...], all_studies: bool, as_json: bool) -> None:
    """Run studies by name; exit code 1 where a verdict is another one than was committed."""
    from moesim.study import load_studies, run_study, studies_json, study_names

    if bool(names) == all_studies:
        raise ValueError(f"study run: give names of studies, or --all; known: {', '.join(study_names())}")
    chosen = load_studies(study_names() if all_studies else names)
    judged = []
    for place, study in enumerate(chosen, 1):
        click.echo(f"{study.name} ({place} of {len(chosen)})", err=True)
        judged.append(run_study(study))
    shape = studies_json(judged)
    if as_json:
        click.echo(json.dumps(shape, indent=2))
    else:
        _print(judged, shape["totals"])
    if shape["totals"]["changed"]:
        click.echo(f"verdicts that are not the committed ones: {shape['totals']['changed']}", err=True)
        sys.exit(1)


def _print(judged: Sequence[Judged], totals: dict[str, int]) -> None:
    from rich.console import Console
    from rich.text import Text

    from moesim.study import VERDICTS

    console = Console()
    console = Console(width=min(console.width, WIDTH) if console.is_terminal else WIDTH)
    for found in judged:
        study = found.study
        console.print(Text(study.name, style="bold"), Text(study.title.rstrip(".")))
        for head, text in (("lever", study.lever), ("cannot speak about", study.silent_on)):
            console.print(Text(f"  {head}: {text}", style="dim"), soft_wrap=False)
        console.print(_table(found.claims))
    counted = ", ".join(f"{totals[verdict]} {verdict}" for verdict in VERDICTS)
    console.print(f"{totals['claims']} claims: {counted}", highlight=False)


def _table(claims: Sequence[Claim]) -> Table:
    """A row for each claim; a reason, where there is one, under it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from moesim.report.tables import NONE
    from moesim.study import NOT_AT_HAND

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    table.add_column("claim", ratio=2, overflow="fold")
    table.add_column("where", ratio=1, overflow="fold")
    for head in ("paper", "ours", "within"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for claim in claims:
        says = Text(claim.says)
        if claim.reason and claim.reason != NOT_AT_HAND:
            says.append(f"\n{claim.reason}", style="yellow" if claim.verdict == "differs" else "dim")
        verdict = Text(claim.verdict, style=STYLES[claim.verdict])
        if claim.has_changed:
            verdict = Text(f"{claim.verdict}, was {claim.committed}", style="bold red")
        share = f"{claim.tolerance:.0%}" if claim.tolerance >= EXACT else "exactly"
        within = share if claim.tolerance and claim.is_testable else ""
        table.add_row(says, Text(claim.where), *written(claim), within, verdict)
    if any(claim.reason == NOT_AT_HAND for claim in claims):
        table.caption = f"{NONE} {NOT_AT_HAND}: a prediction"
        table.caption_justify = "left"
    return table


def written(claim: Claim) -> tuple[str, str]:
    """The paper's number and ours, in a unit that a person would say them in.

    >>> from moesim.study import Claim
    >>> written(Claim("", "", paper=116e-6, ours=1.2e-4, unit="s", tolerance=0.1))
    ('116 µs', '120 µs')
    >>> written(Claim("", "", paper="> 1", ours=1.66, unit="ratio"))
    ('> 1 ×', '1.66 ×')
    """
    from moesim.report.tables import NONE, quantity, unit_of

    size, sign = unit_of(f"_{claim.unit}", [v for v in (claim.ours, claim.paper) if isinstance(v, float)])
    if claim.unit == "tokens_per_s":
        size, sign = 1.0, "tokens/s"
    sign = "\u00d7" if claim.unit == "ratio" else sign

    def say(value: float | str | None) -> str:
        if value is None:
            return NONE
        if not isinstance(value, str):
            return quantity(value, (size, sign), 0 if not claim.unit and value == round(value) else None)
        words = [word if word in ("<", "<=", ">", ">=", "to") else f"{float(word) / size:g}" for word in value.split()]
        return " ".join([*words, sign] if sign else words)

    return say(claim.paper), say(claim.ours)
