"""`moesim check`: find every mistake in scenario files, machines, models and traces without running anything."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click

_TRACE_SUFFIXES = (".parquet", ".arrow")


@click.command("check")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
def check_command(paths: tuple[Path, ...]) -> None:
    """Check PATHS: scenarios and machines (.toml), traces (.parquet, .arrow), models (config.json or its folder)."""
    check_all(paths, _check)


def check_all(paths: Iterable[Path], say: Callable[[Path], str]) -> None:
    """Print what `say` makes of each path; after errors on any of them, exit with 2."""
    broken = 0
    for path in paths:
        try:
            click.echo(f"{path}: {say(path)}")
        except ValueError as error:
            broken += 1
            text = str(error)
            click.echo(f"error: {text if str(path) in text else f'{path}: {text}'}", err=True)
    if broken:
        sys.exit(2)


def say_trace(path: Path) -> str:
    """What a right trace file holds.

    Raises:
        ValueError: every mistake of the file, with column and row.
    """
    from moesim.files.scenarios import load_trace

    trace = load_trace(str(path))
    shape = f"{trace.num_layers} layers x {trace.num_experts} experts, top {trace.top_k}"
    return f"trace of {trace.num_tokens} tokens, {shape}, {trace.origin}"


def _check(path: Path) -> str:
    """What the file is, in a few words, once nothing is wrong with it."""
    from moesim.files import hardware, models, scenarios, services, tables

    if path.suffix in _TRACE_SUFFIXES:
        return say_trace(path)
    if path.suffix == ".json" or (path.is_dir() and (path / "config.json").exists()):
        model = models.load_model(str(path))
        return f"model with {model.num_params / 1e9:.2f} billion parameters"
    values = tables.read_toml(path)
    if "device" in values or "memory" in values:
        cluster = hardware.load_cluster(str(path))
        return f"machine with {cluster.num_ranks} x {cluster.device.name}"
    if services.is_service(values):
        names = [service.name for service in services.load_services(path)]
        return f"service with {len(names)} set-up(s): {', '.join(names)}"
    loaded = scenarios.load_scenarios(path)
    return f"scenario with {len(loaded)} set-up(s): {', '.join(s.name for s in loaded)}"
