"""The command line: files in, a table or JSON on stdout, diagnostics on stderr; exit 0, or 2 for bad input."""

from __future__ import annotations

import sys

import click

from moesim.cli.calibrate import calibrate_command
from moesim.cli.capture import capture_command
from moesim.cli.check import check_command
from moesim.cli.import_flags import import_flags_command
from moesim.cli.list import list_command
from moesim.cli.place import place_command
from moesim.cli.profile import profile_group
from moesim.cli.rebalance import rebalance_command
from moesim.cli.run import run_command
from moesim.cli.study import study_group
from moesim.cli.trace import trace_group
from moesim.cli.validate import validate_group
from moesim.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moesim")
def cli() -> None:
    """Simulate Mixture-of-Experts systems: how long, how much, and why."""


for command in (
    run_command, check_command, list_command, capture_command, trace_group, profile_group, validate_group,
    calibrate_command, study_group, import_flags_command, place_command, rebalance_command,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Run the command line; bad input ends with one message and exit code 2."""
    try:
        cli()
    except ValueError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


__all__ = ["cli", "main"]
