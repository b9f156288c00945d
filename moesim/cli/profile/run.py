"""`moesim profile run`: time operators on this machine into a table of points and a device file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click


@click.command("run")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="What is timed.")
@click.option("--budget", "budget_s", default=240.0, show_default=True, type=click.FloatRange(min=1), help="Seconds.")
@click.option("--model", "models", multiple=True, help="Model shape whose parts are timed on a CPU; all by default.")
@click.option("--seed", default=0, show_default=True, help="Of weights, inputs and the order of timings.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
def run_profile_command(device: str, budget_s: float, models: tuple[str, ...], seed: int, out: Path) -> None:
    """Time operators in shuffled rounds and write OUT/tables.parquet and OUT/device.toml.

    Every timing is kept in OUT/samples.jsonl as it is made: interrupted, or run again with more seconds, the same
    command goes on from there. Cells that do not fit the budget are dropped and named.
    """
    from moesim.profile.machine import keep_freed_memory, one_thread

    one_thread()
    keep_freed_memory()
    try:
        import moesim.profile.parts  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"profiling needs {error.name}, which is not installed; run: pip install 'moesim[capture]'"
        ) from error
    out.mkdir(parents=True, exist_ok=True)
    try:
        dropped = _profile(device, budget_s, models, seed, out)
    except KeyboardInterrupt:
        click.echo(
            f"interrupted; {out}/samples.jsonl keeps what was timed: the same command goes on from there", err=True
        )
        sys.exit(130)
    if dropped:
        click.echo(f"dropped for want of time: {', '.join(dropped)}; give a larger --budget to time them", err=True)
    click.echo(f"{out / 'tables.parquet'}\n{out / 'device.toml'}")


def _profile(device: str, budget_s: float, models: tuple[str, ...], seed: int, out: Path) -> tuple[str, ...]:
    """Time, write both files, and return what was dropped."""
    from moesim.files.keys import nearest
    from moesim.files.profiles.tables import write_tables
    from moesim.profile.machine import device_toml, machine_facts
    from moesim.profile.rounds import Samples, time_rounds
    from moesim.profile.shapes import SHAPES
    from moesim.profile.tables import provenance_of, tables_of

    unknown = [name for name in models if name not in SHAPES]
    if unknown:
        raise ValueError(f"--model {unknown[0]!r} is not a model shape; {nearest(unknown[0], SHAPES)}")
    facts: dict[str, Any] = machine_facts() | {"device": device, "models": sorted(models or SHAPES), "seed": seed}
    samples = Samples(out / "samples.jsonl", facts)
    if device == "cuda":
        from moesim.profile.cuda import cuda_jobs, cuda_toml

        cells, jobs = cuda_jobs(seed)
    else:
        from moesim.profile.cpu import Limits, table_jobs

        cells, jobs = table_jobs([SHAPES[name] for name in facts["models"]], Limits(), seed)
    with timing_bar("timing in shuffled rounds") as report:
        timing = time_rounds(jobs, samples, budget_s, seed=seed, report=report)
    write_tables(tables_of(cells, samples, "cpu_s", out.name, provenance_of(facts)), out / "tables.parquet")
    median = {key: float(found[0]) for key, found in samples.percentiles("cpu_s", (50,)).items()}
    timed = {cell: median[cell.key] for cell in cells if cell.key in median}
    text = cuda_toml(timed, facts) if device == "cuda" else device_toml(timed, facts)
    temporary = out / f".device.toml.{os.getpid()}.tmp"
    temporary.write_text(text)
    temporary.replace(out / "device.toml")
    return timing.dropped


@contextmanager
def timing_bar(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr, gone when done; call what it yields with the share that is done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)
