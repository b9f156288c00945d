"""The one way in which every validation is printed."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

from moesim.validate.cases import Validation, summary

SHOWN = (
    ("rows", "{:d}"),
    ("median_abs_error", "{:.1%}"),
    ("p75_abs_error", "{:.1%}"),
    ("p90_abs_error", "{:.1%}"),
    ("bias", "{:+.1%}"),
    ("coverage_90", "{:.0%}"),
    ("baseline_median_abs_error", "{:.1%}"),
    ("baseline_p90_abs_error", "{:.1%}"),
)
_HEADS = ("rows", "median error", "75th", "90th", "bias", "in 90 % interval", "roofline, median", "roofline, 90th")


def print_skipped(name: str, path: Path, give: str, as_json: bool) -> None:
    """One line that a validation was left out because `path`, which it needs, is not there."""
    because = f"{path} is not there; give {give}"
    click.echo(json.dumps({"name": name, "skipped": because}) if as_json else f"skipped: {because}")


def print_validation(validation: Validation, as_json: bool, all_cases: bool = False) -> None:
    """JSON, or a table of each group and of all together, and with `all_cases` one of every case."""
    if as_json:
        click.echo(json.dumps(validation.as_json(), indent=2))
        return
    console = Console()
    if not console.is_terminal:  # a pipe has no width to fold to
        console = Console(width=160)
    for name, said in validation.facts.items():
        console.print(f"{name}: {f'{said:.4g}' if isinstance(said, float) else said}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for head in _HEADS:
        table.add_column(head, justify="right")
    groups = [group for group in validation.groups() if group]
    rows = [(group, [case for case in validation.cases if case.group == group]) for group in groups]
    for name, cases in [*rows, ("all", list(validation.cases))]:
        found = summary(cases)
        table.add_row(name, *(form.format(found[key]) if key in found else "-" for key, form in SHOWN))
    console.print(table, highlight=False)
    if all_cases:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for head in ("case", "measured (s)", "predicted (s)", "90 % interval", "error"):
            table.add_column(head, justify="left" if head == "case" else "right")
        for case in validation.cases:
            interval = f"{case.low:.4g} to {case.high:.4g}"
            error = f"{case.error:+.1%}{' fitted' if case.fitted else ''}"
            table.add_row(case.case, f"{case.measured:.4g}", f"{case.predicted:.4g}", interval, error)
        console.print(table, highlight=False)
