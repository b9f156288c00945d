"""`moesim trace stats`: measure a routing trace."""

from __future__ import annotations

import json
from pathlib import Path

import click

_EP = (8, 32)


@click.command("stats")
@click.argument("trace")
@click.option("--ep", multiple=True, type=int, metavar="RANKS", help="Expert-parallel ranks; repeatable. [8, 32]")
@click.option("--batch", multiple=True, type=int, metavar="N", help="Decoding requests; repeatable. [1, 4, 16, 64]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, complete per layer, instead of tables.")
@click.option("--report", type=click.Path(path_type=Path), help="Write one self-contained HTML file with plots.")
def stats_command(trace: str, ep: tuple[int, ...], batch: tuple[int, ...], as_json: bool, report: Path | None) -> None:
    """Measure TRACE, a packaged trace or a .parquet file: load, locality, caches, structure, topics, prediction."""
    from moesim.files.scenarios import load_trace
    from moesim.report import check_target
    from moesim.report.routing import Measured, notes, routing_json, routing_sections, title_of
    from moesim.routing.load import sizes_that_fit
    from moesim.routing.statistics import BATCHES, statistics

    if report:
        check_target(report)
    routing = load_trace(trace)
    sizes = tuple(dict.fromkeys(ep)) or sizes_that_fit(routing, _EP)
    wanted = tuple(sorted(set(batch))) or BATCHES
    measured = Measured(routing, statistics(routing, ep=sizes, batches=wanted), sizes, wanted)
    if report:
        from moesim.report.routing_page import write_routing_page

        write_routing_page(measured, report)
    if as_json:
        click.echo(json.dumps(routing_json(measured), indent=2))
    else:
        from rich.console import Console

        from moesim.report.tables import terminal_table

        console = Console()
        if not console.is_terminal:  # a pipe has no width to fold to
            console = Console(width=120)
        console.print(title_of(routing), style="bold", highlight=False)
        console.print(
            "mean over layers, the least and the most of a layer, and what chance would give", highlight=False
        )
        for section in routing_sections(measured):
            console.print()
            console.print(terminal_table(section, slice(None), console.width))
    for note in notes(measured):
        click.echo(f"note: {note}", err=True)
    if report:
        click.echo(f"report: {report}", err=True)
