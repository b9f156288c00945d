"""The verdict on a trace generator as tables, for the terminal or in Markdown."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table

from moesim.routing.judge import AIM, Verdict


def print_judged(verdict: Verdict, markdown: bool = False) -> None:
    """Print what was compared, every statistic of held-out and generated requests, and what another shape keeps."""
    tables = [_statistics(verdict)] + ([_kept(verdict)] if verdict.kept else [])
    if markdown:
        print("\n".join(f"- {what}: {said}" for what, said in verdict.facts.items()))
        for columns, rows in tables:
            lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *([f"`{row[0]}`", *row[1:]] for row in rows)]
            print("\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    console = Console()
    if not console.is_terminal:  # a pipe has no width to fold to
        console = Console(width=160)
    for what, said in verdict.facts.items():
        console.print(f"{what}: {said}", highlight=False)
    for columns, rows in tables:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column, justify="left" if column == columns[0] else "right")
        for row in rows:
            table.add_row(*row)
        console.print()
        console.print(table, highlight=False)


def _statistics(verdict: Verdict) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of every statistic of held-out, fitted and generated requests."""
    compared = ("generated", "zipf")
    columns = ["mean over layers", *verdict.columns, *(f"{c} / held-out" for c in compared), f"within {AIM:.0%}"]
    rows = []
    for name, truth in verdict.columns["held-out"].items():
        values = [_number(values[name]) for values in verdict.columns.values()]
        ratios = [_ratio(verdict.columns[c][name], truth) for c in compared]
        rows.append([name, *values, *ratios, {None: "", True: "yes", False: "no"}[verdict.within_aim(name)]])
    return columns, rows


def _kept(verdict: Verdict) -> tuple[list[str], list[list[str]]]:
    rows = [
        [name, f"{truth:.3g}", f"{other:.3g}", _ratio(other, truth)] for name, (truth, other) in verdict.kept.items()
    ]
    return ["kept in the other shape", "held-out", "other shape", "ratio"], rows


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _ratio(value: float, truth: float) -> str:
    return f"{value / truth:.2f}" if truth > 0 and not math.isnan(value) else "-"
