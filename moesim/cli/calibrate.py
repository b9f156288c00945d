"""`moesim calibrate`: fit what kernels do not show to real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from moesim.calibrate.folds import HeldOut
    from moesim.calibrate.serving import Priced
    from moesim.costs.calibration import Calibration


def _facts(items: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {item}: must be name=value, as in system=h100_sxm")
        found[name.strip()] = int(text) if text.strip().isdigit() else text.strip()
    return found


@click.command("calibrate")
@click.argument("runs", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Calibration to write (.toml), for scenarios.",
)
@click.option(
    "--kernels", type=click.Path(path_type=Path), help="Measured tables: aiconfigurator's folder, or profiles of ours."
)
@click.option("--recipes", type=click.Path(path_type=Path), help="Instead of the packaged recipes.")
@click.option(
    "--trace", type=click.Path(path_type=Path), help="torch profiler trace: its gaps are the host's overhead."
)
@click.option(
    "--set", "facts", multiple=True, metavar="NAME=VALUE", help="What a benchmark's file leaves out; repeatable."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def calibrate_command(
    runs: Path, out: Path | None, kernels: Path | None, recipes: Path | None, trace: Path | None,
    facts: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Fit host overhead, factors of kernels, interference of prefills and acceptance of drafts to RUNS.

    RUNS is a table of serving runs (.parquet, .csv), or results of vLLM's or SGLang's benchmark or `moesim run --json`.
    """
    from moesim.calibrate.calibration import calibrate
    from moesim.calibrate.measured import load_kernels
    from moesim.calibrate.recipes import load_recipes, with_recipes
    from moesim.calibrate.serving import price_runs, roofline_kernels
    from moesim.costs.calibration import CONSTANTS, with_measured_gap
    from moesim.files.profiles.calibrated import write_calibration
    from moesim.files.runs_layouts import read_runs
    from moesim.files.runs_profiler import read_profile

    read = with_recipes(read_runs(runs, _facts(facts)), load_recipes(recipes))
    constants = with_measured_gap(CONSTANTS, read_profile(trace).gap_s) if trace else CONSTANTS
    priced = price_runs(read, load_kernels(kernels) if kernels else roofline_kernels)
    found, held = calibrate(priced, f"measured tables: {kernels.name}" if kernels else "roofline", constants)
    if out:
        write_calibration(found, out)
        click.echo(f"calibration: {out}", err=True)
    if as_json:
        shape = found.as_json()
        shape["table"] = [
            {"case": run.name, "group": run.group, "measured": run.tpot_s, "predicted": float(predicted)}
            for run, predicted in zip(read, held.predicted_s_N, strict=True)
        ]
        click.echo(json.dumps(shape, indent=2))
    else:
        _print(found, priced, held)


def _print(found: Calibration, priced: Priced, held: HeldOut) -> None:
    import numpy as np
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from moesim.costs.calibration import CONSTANTS
    from moesim.files.runs import groups_of

    console = Console()
    if not console.is_terminal:  # a pipe has no width to fold to
        console = Console(width=160)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("constant", "value", "range", "meaning"):
        table.add_column(head, justify="right" if head in ("value", "range") else "left")
    for c in CONSTANTS:
        value, unit = found.values[c.name], f" {c.unit}" if c.unit else ""
        said = (
            c.meaning if found.sources[c.name].startswith("fitted") else f"{c.meaning} (assumed: no run speaks of it)"
        )
        table.add_row(c.name, f"{value:.3g}{unit}", f"{c.low:g} to {c.high:g}", said)
    console.print(table, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("held out", "runs", "median error", "75th", "bias"):
        table.add_column(head, justify="left" if head == "held out" else "right")
    error_N = held.predicted_s_N / priced.tpot_s_N - 1
    labels = [run.group for run in priced.runs]
    for name in [*groups_of(priced.runs), "all"]:
        errors = error_N[[name in (label, "all") for label in labels]]
        row = (f"{len(errors)}", f"{np.median(abs(errors)):.1%}", f"{np.percentile(abs(errors), 75):.1%}")
        table.add_row(name, *row, f"{np.median(errors):+.1%}")
    console.print(table, highlight=False)
    console.print(
        f"held out by {found.facts['held_out_by']}; 90 % of measured / predicted lie in {found.low_ratio:.2f} to "
        f"{found.high_ratio:.2f}; kernels: {found.kernels}",
        highlight=False,
    )
