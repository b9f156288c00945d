"""`moesim validate kernels`: measured tables against what was left out of them."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("kernels")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--device", "devices", multiple=True, help="A system of the data, such as h100_sxm; repeatable.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of held-out rows.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable result.")
@click.option("--all", "all_cases", is_flag=True, help="Print every case.")
def kernels_command(directory: Path, devices: tuple[str, ...], seed: int, as_json: bool, all_cases: bool) -> None:
    """Predict rows held out of the measured tables under DIRECTORY, and one device's from another's.

    DIRECTORY, or its folder data, holds NVIDIA aiconfigurator's tables, SYSTEM/FAMILY/BACKEND/VERSION/TABLE.parquet.
    Without it the validation is skipped.
    """
    from moesim.cli.validate.printing import print_skipped, print_validation
    from moesim.validate.kernels import validate_kernels

    if not directory.exists():
        print_skipped("kernels", directory, "the folder that holds the systems", as_json)
        return
    found = validate_kernels(directory, devices, seed, lambda line: click.echo(line, err=True))
    print_validation(found, as_json, all_cases)
