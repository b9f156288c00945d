"""`moesim validate serving`: seconds per output token of real runs, predicted without their own group."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("serving")
@click.argument("runs", type=click.Path(path_type=Path))
@click.option(
    "--kernels", type=click.Path(path_type=Path), help="Measured tables: aiconfigurator's folder, or profiles of ours."
)
@click.option("--recipes", type=click.Path(path_type=Path), help="Instead of the packaged recipes.")
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="Written by `moesim calibrate`; nothing is fitted."
)
@click.option("--simulate/--closed-form", default=True, show_default=True, help="Whether to simulate requests as well.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--all", "all_cases", is_flag=True, help="Print every run.")
def serving_command(
    runs: Path,
    kernels: Path | None,
    recipes: Path | None,
    calibration: Path | None,
    simulate: bool,
    as_json: bool,
    all_cases: bool,
) -> None:
    """Predict the time per output token of RUNS; without them, or the tables, the validation is skipped.

    Each (model, system, backend) is predicted by constants fitted to the others, or all by the calibration. Runs whose
    prompts and answers are computed together are then simulated, request by request.
    """
    from moesim.cli.validate.printing import print_skipped, print_validations

    needed = {runs: "a table of serving runs, or a folder of them", kernels: "a folder of measured kernel tables"}
    for path, give in needed.items():
        if path and not path.exists():
            print_skipped("serving", path, give, as_json)
            return
    from moesim.calibrate.measured import load_kernels
    from moesim.calibrate.recipes import load_recipes, with_recipes
    from moesim.files.profiles.calibrated import load_calibration
    from moesim.files.runs_layouts import read_runs
    from moesim.validate.serving import validate_serving

    read = with_recipes(read_runs(runs), load_recipes(recipes))
    made = load_kernels(kernels) if kernels else None
    known = load_calibration(calibration) if calibration else None
    found = [validate_serving(read, made, known)]
    if simulate:
        from moesim.validate.serving_simulated import simulate_serving

        found += simulate_serving(read, found[0], made, known, lambda line: click.echo(line, err=True))
    print_validations(found, as_json, all_cases)
