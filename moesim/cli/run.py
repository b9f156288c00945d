"""`moesim run`: run every set-up of a scenario file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command("run")
@click.argument("scenario", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change one key of the base set-up; repeatable.",
)
@click.option("--engine", type=click.Choice(["simulate", "estimate"]), help="Instead of the scenario's own.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--report", type=click.Path(path_type=Path), help="Write one self-contained HTML file.")
@click.option("--perfetto", type=click.Path(path_type=Path), help="Write a timeline for ui.perfetto.dev.")
def run_command(
    scenario: Path,
    changes: tuple[str, ...],
    engine: str | None,
    as_json: bool,
    report: Path | None,
    perfetto: Path | None,
) -> None:
    """Run SCENARIO, a TOML file: its base set-up and those beside it."""
    from rich.console import Console
    from rich.progress import Progress

    from moesim import verbs
    from moesim.report import check_target

    for target in (report, perfetto):
        if target:
            check_target(target)
    scenarios = verbs.load(scenario, changes)
    timeline = 2 if perfetto else 0
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        results = [verbs.run(item, engine, timeline) for item in progress.track(scenarios, description="running")]
    if report:
        from moesim.report.html import write_html

        write_html(results, report)
    if perfetto:
        from moesim.report.perfetto import write_perfetto

        write_perfetto(results, perfetto)
    if as_json:
        shape = results[0].as_json()
        if len(results) > 1:
            shape["beside"] = {result.name: result.as_json() for result in results[1:]}
        click.echo(json.dumps(shape, indent=2))
    else:
        from moesim.report.tables import result_tables

        console = Console()
        for table in result_tables(results, width=console.width):
            console.print(table)
    for kind, path in {"report": report, "timeline": perfetto}.items():
        if path:
            click.echo(f"{kind}: {path}", err=True)
