"""`moesim trace`: look at routing, turn it into traces, and make more of it."""

from __future__ import annotations

import click

from moesim.cli.trace.stats import stats_command


@click.group("trace")
def trace_group() -> None:
    """Look at routing traces, check and convert them, fit a generator to one and sample from it."""


COMMANDS: tuple[click.Command, ...] = (stats_command,)
for _command in COMMANDS:
    trace_group.add_command(_command)
