"""`moesim profile`: time operators on this machine, and take in tables that others measured."""

from __future__ import annotations

import click

COMMANDS: tuple[click.Command, ...] = ()


@click.group("profile")
def profile_group() -> None:
    """Measured tables: time operators on this machine, or import what others measured."""


for command in COMMANDS:
    profile_group.add_command(command)
