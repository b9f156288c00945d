"""`moesim trace sample`: new routing from a fitted generator, of any length."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from moesim.cli.capture import TokenRange
from moesim.cli.trace.shape import SHAPE


@click.command("sample")
@click.argument("generator", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Trace file to write (.parquet, .arrow)."
)
@click.option("--requests", default=64, show_default=True, help="Requests to make.")
@click.option("--prompt-tokens", type=TokenRange(), help="Prompt length, or range; as fitted where not given.")
@click.option("--output-tokens", type=TokenRange(), help="Answer length, or range; as fitted where not given.")
@click.option("--shape", type=SHAPE, help="Another routing shape, such as 58x256x8; as fitted where not given.")
@click.option("--scores", is_flag=True, help="With full router scores (2 bytes for each token, layer and expert).")
@click.option("--seed", default=0, show_default=True, help="Of every draw.")
def sample_command(
    generator: Path, out: Path, requests: int, prompt_tokens: tuple[int, int] | None,
    output_tokens: tuple[int, int] | None, shape: tuple[int, int, int] | None, scores: bool, seed: int,
) -> None:  # fmt: skip
    """Sample a trace from GENERATOR, a file written by `moesim trace fit`. Memory is bounded, whatever the length."""
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    from moesim.files.generators import read_generator
    from moesim.files.traces import TraceWriter
    from moesim.routing.generator import Shape
    from moesim.routing.load import expert_load_LE
    from moesim.routing.scores import with_scores

    fitted = read_generator(generator)
    parts = fitted.sample(
        requests, prompt_tokens=prompt_tokens, output_tokens=output_tokens, shape=Shape(*shape) if shape else None,
        seed=seed,
    )  # fmt: skip
    rng, popularity_LE = np.random.default_rng([seed, 1]), None
    with (
        TraceWriter(out) as writer,
        Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        bar = progress.add_task("sampling", total=requests)
        for part in parts:
            if scores and part.scores_TLE is None:
                if popularity_LE is None:
                    popularity_LE = expert_load_LE(part) + 1.0
                part = with_scores(part, popularity_LE, rng)
            writer.append(part)
            progress.update(bar, completed=int(part.request_T[-1]) + 1)
    click.echo(f"trace: {out}", err=True)
