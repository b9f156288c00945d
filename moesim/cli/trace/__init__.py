"""`moesim trace`: look at routing, turn it into traces, and make more of it."""

from __future__ import annotations

import click

from moesim.cli.trace.check import check_command
from moesim.cli.trace.convert import convert_command
from moesim.cli.trace.fit import fit_command
from moesim.cli.trace.sample import sample_command
from moesim.cli.trace.stats import stats_command


@click.group("trace")
def trace_group() -> None:
    """Look at routing traces, check and convert them, fit a generator to one and sample from it."""


for command in (stats_command, check_command, convert_command, fit_command, sample_command):
    trace_group.add_command(command)
