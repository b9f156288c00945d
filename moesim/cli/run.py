"""`moesim run`: run every set-up of a scenario file."""

from __future__ import annotations

import json
import math
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
@click.option(
    "--requests", type=click.Path(path_type=Path), help="Services: write a row per request, .csv or .parquet."
)
@click.option("--find", type=click.Choice(["rate"]), help="Services: the highest rate of requests within the SLO.")
@click.option(
    "--measure-from-s", type=float, default=0.0, help="Services: measure from here on; leaves out filling up."
)
@click.option("--measure-until-s", type=float, default=math.inf, help="Services: measure until here.")
def run_command(
    scenario: Path,
    changes: tuple[str, ...],
    engine: str | None,
    as_json: bool,
    report: Path | None,
    perfetto: Path | None,
    requests: Path | None,
    find: str | None,
    measure_from_s: float,
    measure_until_s: float,
) -> None:
    """Run SCENARIO, a TOML file: its base set-up and those beside it.

    A file with a [requests] table is a service, whose requests come over time. Ctrl-C ends its run early: what was done
    by then is printed, marked as partial, with exit code 130.
    """
    from rich.console import Console
    from rich.progress import Progress

    from moesim import verbs
    from moesim.files.boxes import is_box
    from moesim.files.tables import read_toml
    from moesim.report import check_target

    window = measure_from_s, measure_until_s
    if is_box(read_toml(scenario)):
        if engine or perfetto or requests or find or window != (0.0, math.inf):
            raise ValueError(f"{scenario}: what fits a box takes --set, --json and --report only")
        from moesim.cli.boxes import run_box

        run_box(scenario, changes, as_json, report)
        return
    if verbs.is_service(read_toml(scenario)):
        if engine == "estimate" or perfetto:
            raise ValueError(f"{scenario}: a service runs on --engine simulate and has no --perfetto; leave them out")
        from moesim.cli.services import check_options, run_services
        from moesim.serving.metrics import Window

        check_options(report, requests, find, Window(*window))
        services, play = verbs.load_services(scenario, changes), verbs.simulate_service
        sys.exit(run_services(services, play, as_json, report, requests, find, Window(*window)))
    if requests or find or window != (0.0, math.inf):
        raise ValueError(
            f"{scenario}: --requests, --find and --measure-... are for services; this file has no [requests] table"
        )
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
