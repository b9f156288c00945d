"""`moesim validate network`: collectives against the sizes that were left out."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("network")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--device", "devices", multiple=True, help="A system of the data, such as h100_sxm; repeatable.")
@click.option(
    "--deepep", type=click.Path(path_type=Path), help="CSV of DeepEP's published times; EP 16, 64, 256 are predicted."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--all", "all_cases", is_flag=True, help="Print every case.")
def network_command(
    directory: Path, devices: tuple[str, ...], deepep: Path | None, as_json: bool, all_cases: bool
) -> None:
    """Fit start, rate and pipeline of collectives to every second size under DIRECTORY, and predict the others.

    DIRECTORY, or its folder data, holds NVIDIA aiconfigurator's tables. Without it the validation is skipped.
    """
    from moesim.cli.validate.printing import print_skipped, print_validation
    from moesim.validate.network import validate_network

    for path, what in ((directory, "the folder that holds the systems"), (deepep, "DeepEP's published times")):
        if path is not None and not path.exists():
            print_skipped("network", path, what, as_json)
            return
    found = validate_network(directory, devices, deepep, lambda line: click.echo(line, err=True))
    print_validation(found, as_json, all_cases)
