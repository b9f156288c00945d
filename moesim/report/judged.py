"""The verdict on a trace generator as tables, for the terminal or in Markdown."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from moesim.routing.judge import AIM, Verdict


def print_judged(verdict: Verdict, markdown: bool = False) -> None:
    """Print what was compared, every statistic of held-out and generated requests, and what another shape keeps."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for what, said in verdict.facts.items():
        console.print(f"{'- ' if markdown else ''}{what}: {said}", highlight=False)
    console.print()
    style = box.MARKDOWN if markdown else box.SIMPLE_HEAD
    table = Table(box=style, pad_edge=markdown)
    table.add_column("mean over layers")
    for column in (*verdict.columns, "generated / held-out", "zipf / held-out", f"within {AIM:.0%}"):
        table.add_column(column, justify="right")
    for name, truth in verdict.columns["held-out"].items():
        values = [values[name] for values in verdict.columns.values()]
        ratios = [f"{verdict.columns[c][name] / truth:.2f}" if truth else "-" for c in ("generated", "zipf")]
        aimed = {None: "", True: "yes", False: "no"}[verdict.within_aim(name)]
        quoted = f"`{name}`" if markdown else name
        table.add_row(quoted, *(f"{value:.3g}" for value in values), *ratios, aimed)
    console.print(table, highlight=False)
    if verdict.kept:
        table = Table(box=style, pad_edge=markdown)
        for column in ("kept in the other shape", "held-out", "other shape", "ratio"):
            table.add_column(column, justify="left" if column.startswith("kept") else "right")
        for name, (truth, other) in verdict.kept.items():
            table.add_row(name, f"{truth:.3g}", f"{other:.3g}", f"{other / truth:.2f}" if truth else "-")
        console.print(table, highlight=False)
