"""`moesim validate`: predicted against measured."""

from __future__ import annotations

import click

from moesim.cli.validate.kernels import kernels_command
from moesim.cli.validate.network import network_command
from moesim.cli.validate.serving import serving_command
from moesim.cli.validate.this_machine import this_machine_command
from moesim.cli.validate.vllm_runs import vllm_runs_command
from moesim.cli.validate.wide_ep import wide_ep_command

COMMANDS: tuple[click.Command, ...] = (
    this_machine_command,
    kernels_command,
    network_command,
    serving_command,
    vllm_runs_command,
    wide_ep_command,
)


@click.group("validate")
def validate_group() -> None:
    """Compare predictions with measurements: errors, coverage, and a table of every case."""


for command in COMMANDS:
    validate_group.add_command(command)
