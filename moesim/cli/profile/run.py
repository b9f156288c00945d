"""`moesim profile run`: time operators on this machine into a table of points and a device file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from moesim.profile.rounds import Timing


@click.command("run")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="What is timed.")
@click.option("--budget", "budget_s", default=240.0, show_default=True, type=click.FloatRange(min=1), help="Seconds.")
@click.option("--model", "models", multiple=True, help="Model shape whose parts are timed on a CPU; all by default.")
@click.option("--forward", is_flag=True, help="On a CUDA device, time whole forward passes of an MoE model too.")
@click.option("--seed", default=0, show_default=True, help="Of weights, inputs and the order of timings.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
def run_profile_command(
    device: str, budget_s: float, models: tuple[str, ...], forward: bool, seed: int, out: Path
) -> None:
    """Time operators in shuffled rounds and write OUT/tables.parquet and OUT/NAME.toml, the device; NAME is OUT's.

    On a CUDA device also OUT/ceilings.json and .txt (kernels against the library and what the device was measured to
    do) and, with --forward, OUT/forward.csv. Every timing is kept in OUT/samples.jsonl as it is made: interrupted, or
    run again with more seconds, the same command goes on from there. Cells that do not fit the budget are dropped and
    named.
    """
    from moesim.profile.machine import keep_freed_memory, one_thread

    if forward and device != "cuda":
        raise ValueError(
            "--forward goes with --device cuda; on a CPU `moesim validate this-machine` times whole passes"
        )
    if models and device == "cuda":
        raise ValueError("--model goes with --device cpu; on a CUDA device the grid has published models' shapes")
    one_thread()
    keep_freed_memory()
    try:
        import moesim.profile.parts  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"profiling needs {error.name}, which is not installed; run: pip install 'moesim[capture]'"
        ) from error
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    profile = _profile_cuda if device == "cuda" else _profile_cpu
    try:
        profile(budget_s, models, forward, seed, out)
    except KeyboardInterrupt:
        click.echo(
            f"interrupted; {out}/samples.jsonl keeps what was timed: the same command goes on from there", err=True
        )
        sys.exit(130)


def _profile_cpu(budget_s: float, models: tuple[str, ...], _forward: bool, seed: int, out: Path) -> None:
    from moesim.files.keys import nearest
    from moesim.files.profiles.tables import write_tables
    from moesim.profile.cpu import Limits, table_jobs
    from moesim.profile.machine import device_toml, machine_facts, write_whole
    from moesim.profile.rounds import Samples, time_rounds
    from moesim.profile.shapes import SHAPES
    from moesim.profile.tables import medians, provenance_of, tables_of

    unknown = [name for name in models if name not in SHAPES]
    if unknown:
        raise ValueError(f"--model {unknown[0]!r} is not a model shape; {nearest(unknown[0], SHAPES)}")
    facts: dict[str, Any] = machine_facts() | {"device": "cpu", "models": sorted(models or SHAPES), "seed": seed}
    samples = Samples(out / "samples.jsonl", facts)
    cells, jobs = table_jobs([SHAPES[name] for name in facts["models"]], Limits(), seed)
    with timing_bar("timing in shuffled rounds") as report:
        timing = time_rounds(jobs, samples, budget_s, seed=seed, report=report)
    written = [out / "tables.parquet", out / f"{out.name}.toml"]
    write_tables(tables_of(cells, samples, "cpu_s", out.name, provenance_of(facts)), written[0])
    write_whole(device_toml(medians(cells, samples, "cpu_s"), facts), written[1])
    _say(timing, written)


def _profile_cuda(budget_s: float, _models: tuple[str, ...], forward: bool, seed: int, out: Path) -> None:
    from moesim.profile.cuda import Tiles, cuda_jobs, event_bench
    from moesim.profile.cuda_cells import cuda_cells
    from moesim.profile.cuda_device import device_info
    from moesim.profile.cuda_results import write_results
    from moesim.profile.forward_runs import cuda_forwards
    from moesim.profile.machine import machine_facts
    from moesim.profile.rounds import Samples, time_rounds

    info = device_info()
    facts: dict[str, Any] = machine_facts() | {"device": "cuda", "seed": seed, **info.facts}
    samples = Samples(out / "samples.jsonl", facts)
    tiles = Tiles(out / "tiles.json")
    cells = cuda_cells(info.capability, info.has_triton)
    jobs = cuda_jobs(cells, event_bench(), tiles, seed)
    runs, forwards = cuda_forwards(seed) if forward else ([], [])
    with timing_bar("timing in shuffled rounds") as report:
        timing = time_rounds([*forwards, *jobs], samples, budget_s, seed=seed, report=report, survived=(Exception,))
    for key, said in timing.failed.items():
        click.echo(f"failed: {key}: {said}", err=True)
    found = write_results(out, cells, samples, tiles.words, facts, info, runs)
    for line in (*found.left_out, *found.ceilings.figures()):
        click.echo(line, err=True)
    _say(timing, found.written)


def _say(timing: Timing, written: Sequence[Path]) -> None:
    if timing.dropped:
        named = ", ".join(timing.dropped)
        click.echo(f"dropped for want of time: {named}; give a larger --budget to time them", err=True)
    for path in written:
        click.echo(path)


@contextmanager
def timing_bar(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr, gone when done; call what it yields with the share that is done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)
