"""The one way in which every validation is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesim.validate.cases import Case, Validation, summary

SHOWN = {
    "rows": ("rows", "{:d}"),
    "median_abs_error": ("median\nerror", "{:.1%}"),
    "p75_abs_error": ("75th\nerror", "{:.1%}"),
    "p90_abs_error": ("90th\nerror", "{:.1%}"),
    "bias": ("\nbias", "{:+.1%}"),
    "coverage_90": ("in 90 %\ninterval", "{:.0%}"),
    "baseline_median_abs_error": ("roofline\nmedian", "{:.1%}"),
    "baseline_p90_abs_error": ("roofline\n90th", "{:.1%}"),
}
"""Figures of a summary: head of the column, and how it is written."""
SHARES = ("error", "bias", "coverage", "spread")
"""Words in the names of facts that are shares of one."""
WIDTH = 120
"""Columns of a pipe, and the most of a terminal."""


def print_skipped(name: str, path: Path, give: str, as_json: bool) -> None:
    """One line that a validation was left out because `path`, which it needs, is not there."""
    because = f"{path} is not there; give {give}"
    click.echo(json.dumps({"name": name, "skipped": because}) if as_json else f"skipped: {because}")


def print_validation(validation: Validation, as_json: bool, all_cases: bool = False) -> None:
    """JSON, or a table of each group and of all together, and with `all_cases` one of every case."""
    if as_json:
        click.echo(json.dumps(validation.as_json(), indent=2))
        return
    console = _console()
    facts = {**validation.facts, **({"aims": _aims(validation)} if validation.aims else {})}
    for name, said in facts.items():
        console.print(f"{name.replace('_', ' ')}: {_written(name, said)}", highlight=False, markup=False)
    console.print(_summaries(validation), highlight=False)
    if all_cases:
        console.print(_every_case(validation), highlight=False)


def print_validations(validations: Sequence[Validation], as_json: bool, all_cases: bool = False) -> None:
    """The first one, and others of the same measurements after it; as JSON, under "others" of the first."""
    first, *others = validations
    if as_json:
        click.echo(json.dumps({**first.as_json(), "others": [other.as_json() for other in others]}, indent=2))
        return
    print_validation(first, as_json, all_cases)
    for other in others:
        click.echo(f"\n{other.name}\n")
        print_validation(other, as_json, all_cases)


def _console() -> Console:
    console = Console()
    return Console(width=min(console.width, WIDTH) if console.is_terminal else WIDTH)


def print_against_baseline(validation: Validation, as_json: bool, verdict: Callable[[Case], str]) -> None:
    """JSON, or every case with the error of its baseline beside its own, and what is to be said of it."""
    if as_json:
        print_validation(validation, as_json)
        return
    console = _console()
    for name, said in validation.facts.items():
        console.print(f"{name}: {said}", highlight=False, markup=False)
    table = _table(("case", "measured (s)", "predicted (s)", "error", "baseline's\nerror", ""))
    for cases in validation.groups().values():
        table.add_section()
        for case in cases:
            measured, error, theirs = "-", "-", "-"
            if case.measured is not None:
                measured, error = _plain(case.measured), f"{case.predicted / case.measured - 1:+.1%}"
                theirs = "-" if case.baseline is None else f"{case.baseline / case.measured - 1:+.1%}"
            said = "fitted" if case.fitted else verdict(case)
            table.add_row(escape(case.case), measured, _plain(case.predicted), error, theirs, said)
    console.print(table, highlight=False)


def _written(name: str, said: object) -> str:
    """A fact: shares in percent, counts with commas."""
    if isinstance(said, float):
        return f"{said:.1%}" if any(word in SHARES for word in name.replace(",", "").split("_")) else f"{said:.4g}"
    return f"{said:,}" if isinstance(said, int) else str(said)


def _aims(validation: Validation) -> str:
    """Each aim in words, under the head of its column."""
    said = []
    for name, (least, most) in validation.aims.items():
        head = " ".join(SHOWN[name][0].split())
        said.append(f"{head} {f'{least:.0%} to' if least else 'at most'} {most:.0%}")
    return f"{', '.join(said)}; ! misses its aim"


def _table(heads: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", vertical="bottom", overflow="fold")
    return table


def _summaries(validation: Validation) -> Table:
    """A row for each group, those that start with the same word together, and one for all."""
    table = _table(["", *(head for head, _ in SHOWN.values()), *(["aims\nmet"] if validation.aims else [])])
    groups = {group: cases for group, cases in validation.groups().items() if group}
    starts = [group.split()[0] for group in groups]
    for index, (group, cases) in enumerate(groups.items()):
        if index and starts[index] != starts[index - 1] and len(set(starts)) < len(starts):
            table.add_section()
        found = summary(cases)
        missed = validation.missed(found)
        met = f"{len(validation.aims) - len(missed)} of {len(validation.aims)}" if found["rows"] else "-"
        table.add_row(escape(group), *_figures(found, missed), *([met] if validation.aims else []))
    table.add_section()
    table.add_row("all", *_figures(summary(validation.cases), []))
    return table


def _figures(found: Mapping[str, float], missed: Sequence[str]) -> list[str]:
    written = {name: form.format(found[name]) if name in found else "-" for name, (_, form) in SHOWN.items()}
    return [f"[red]!{figure}[/]" if name in missed else figure for name, figure in written.items()]


def _every_case(validation: Validation) -> Table:
    units = {case.unit for case in validation.cases}
    shown = f" ({units.pop()})" if len(units) == 1 else ""
    table = _table(("case", f"measured{shown}", f"predicted{shown}", "90 % interval", "error"))
    for case in validation.cases:
        unit = "" if shown else f" {case.unit}"
        interval = f"{_plain(case.low)} to {_plain(case.high)}"
        error = "" if case.error is None else f"{case.error:+.1%}{' fitted' if case.fitted else ''}"
        measured = "-" if case.measured is None else _plain(case.measured)
        table.add_row(escape(case.case), measured, f"{_plain(case.predicted)}{unit}", interval, error)
    return table


def _plain(value: float) -> str:
    """Four digits, or whole numbers with commas."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"
