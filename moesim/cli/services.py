"""What `moesim run` does with a scenario of a service."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress

    from moesim.service import Service
    from moesim.serving.find import Tried
    from moesim.serving.metrics import Window
    from moesim.serving.outcome import Outcome
    from moesim.serving.results import ServingResult
    from moesim.serving.runs import Simulate

    Engine = Callable[[Service, str, Callable[[int, float], None]], Outcome]
    """Plays a service at "value", "low" or "high", and tells now and then how many requests are finished, at what time
    of the simulation."""

INTERRUPTED = 130
"""Exit code of a run that Ctrl-C ended, after its partial result was printed: 128 + SIGINT, as shells have it."""


def check_options(report: Path | None, requests: Path | None, find: str | None, window: Window) -> None:
    """Refuse what could not be done, before anything is loaded.

    Raises:
        ValueError: a file that cannot be written, or options that do not go together.
    """
    from moesim.report import check_target
    from moesim.report.request_table import check_request_target
    from moesim.serving.metrics import ALL

    if report:
        check_target(report)
    if requests:
        check_request_target(requests)
    if find and window != ALL:
        raise ValueError("--find rate judges all requests: leave out --measure-from-s and --measure-until-s")


def run_services(
    services: Sequence[Service],
    engine: Engine,
    as_json: bool,
    report: Path | None,
    requests: Path | None,
    find: str | None,
    window: Window,
) -> int:
    """Run every set-up of a service file, write what was asked for, print it; the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from moesim.serving.runs import check_findable, run_at_highest_rate, run_service

    for service in services:
        if find:
            check_findable(service)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[says]}"), TimeRemainingColumn()
    console, results = Console(stderr=True), []
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        for service in services:
            simulate = _watched(engine, progress, service.name)
            if find:
                results.append(run_at_highest_rate(service, simulate, _teller(service)))
            else:
                results.append(run_service(service, simulate, window))
            if results[-1].is_partial:
                break
    _write(results, report, requests)
    _print(results, as_json)
    for kind, path in {"report": report, "requests": requests}.items():
        if path:
            click.echo(f"{kind}: {path}", err=True)
    if not results[-1].is_partial:
        return 0
    click.echo(f"stopped: the result of {results[-1].name} is partial", err=True)
    left = [service.name for service in services[len(results) :]]
    if left:
        click.echo(f"not run: {', '.join(left)}", err=True)
    return INTERRUPTED


def _watched(engine: Engine, progress: Progress, name: str) -> Simulate:
    """The engine, with a bar for each run that it does."""
    said = {"value": "", "low": ", efficiencies low", "high": ", efficiencies high"}

    def simulate(service: Service, bound: str) -> Outcome:
        total = len(service.requests)
        task = progress.add_task(f"{name}{said[bound]}", total=total, says="")

        def tell(finished: int, now_s: float) -> None:
            progress.update(task, completed=finished, says=f"{finished:,} of {total:,} requests, {now_s:,.1f} s")

        outcome = engine(service, bound, tell)
        progress.remove_task(task)
        return outcome

    return simulate


def _teller(service: Service) -> Callable[[Tried], None]:
    """Says every rate that was tried, on stderr."""

    def tell(tried: Tried) -> None:
        verdict = "keeps" if tried.attainment >= service.slo.attainment else "breaks"
        share = f"{100 * tried.attainment:.3g} % within the SLO"
        click.echo(f"{service.name}: {tried.rate_per_s:.4g} requests/s: {share}, {verdict} it", err=True)

    return tell


def _write(results: Sequence[ServingResult], report: Path | None, requests: Path | None) -> None:
    if report:
        from moesim.report.serving_page import write_serving_page

        write_serving_page(results, report)
    if requests:
        from moesim.report.request_table import write_requests

        write_requests(results, requests)


def _print(results: Sequence[ServingResult], as_json: bool) -> None:
    from rich.console import Console

    from moesim.report.serving_tables import serving_sections
    from moesim.report.tables import result_tables

    if as_json:
        shape = results[0].as_json()
        if len(results) > 1:
            shape["beside"] = {result.name: result.as_json() for result in results[1:]}
        click.echo(json.dumps(shape, indent=2))
        return
    console = Console()
    for result in results:
        if result.is_partial:
            console.print(f"PARTIAL RESULT of {result.name}: stopped before its end", style="bold yellow")
        if result.search:
            console.print(f"{result.name}: {result.search.says}", highlight=False)
    for table in result_tables(results, console.width, serving_sections(results), 14 if len(results) == 1 else 18):
        console.print(table)
