"""`moesim trace fit`: a generator of requests like those of a trace, judged on requests that it was not fitted on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from moesim.cli.trace.shape import SHAPE


@click.command("fit")
@click.argument("trace")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Generator file to write (.npz).")
@click.option("--classes", default=256, show_default=True, help="Token classes, at most one for 32 tokens.")
@click.option("--near", default=2, show_default=True, help="Requests, beside its own, that a new request is made of.")
@click.option("--run-tokens", default=64.0, show_default=True, help="Tokens copied in a row, on average.")
@click.option("--crossover", default=0.5, show_default=True, help="Share of runs that change over at some layer.")
@click.option("--shape", type=SHAPE, help="Judge a sample of another shape too, such as 58x256x8.")
@click.option("--judge/--no-judge", default=True, help="Compare with held-out requests first.")
@click.option("--seed", default=0, show_default=True, help="Of the clustering and of the judged samples.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--markdown", is_flag=True, help="Print the table in Markdown.")
def fit_command(
    trace: str, out: Path | None, classes: int, near: int, run_tokens: float, crossover: float,
    shape: tuple[int, int, int] | None, judge: bool, seed: int, as_json: bool, markdown: bool,
) -> None:  # fmt: skip
    """Fit a generator to TRACE, a packaged trace or a file.

    First a generator is fitted to every second request and judged on the others: a table of every statistic, held-out
    against generated, with a Zipf-only generator beside it. Then it is fitted to all requests and written.
    """
    from moesim.files.generators import write_generator
    from moesim.files.scenarios import load_trace
    from moesim.routing.generator import Shape, fit_generator
    from moesim.routing.judge import judge_generator

    loaded = load_trace(trace)
    settings: dict[str, Any] = {
        "num_classes": classes,
        "num_near": near,
        "run_tokens": run_tokens,
        "crossover_rate": crossover,
    }
    if judge:
        verdict = judge_generator(loaded, Shape(*shape) if shape else None, seed=seed, **settings)
        if as_json:
            click.echo(json.dumps(verdict.as_json(), indent=2))
        else:
            from moesim.report.judged import print_judged

            print_judged(verdict, markdown)
    if out:
        write_generator(fit_generator(loaded, seed=seed, **settings), out)
        click.echo(f"generator: {out}", err=True)
