"""`moesim profile`: time operators on this machine, and take in tables that others measured."""

from __future__ import annotations

import click

from moesim.cli.profile.convert import import_command
from moesim.cli.profile.run import run_profile_command

COMMANDS: tuple[click.Command, ...] = (run_profile_command, import_command)


@click.group("profile")
def profile_group() -> None:
    """Measured tables: time operators on this machine, or import what others measured."""


for command in COMMANDS:
    profile_group.add_command(command)
