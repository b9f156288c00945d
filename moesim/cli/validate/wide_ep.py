"""`moesim validate wide-ep`: wide expert parallelism against published deployments."""

from __future__ import annotations

import click


@click.command("wide-ep")
@click.option(
    "--trace", default="olmoe-shape-16x64", show_default=True, help="Routing, of any shape: a name or a file."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def wide_ep_command(trace: str, as_json: bool) -> None:
    """Fit two constants to DeepSeek's H800 profile, and predict published deployments of DeepSeek-V3.

    Routing of another shape is resampled to the model's 58 layers of 256 experts.
    """
    from moesim.cli.validate.printing import print_validation
    from moesim.files.scenarios import load_trace
    from moesim.validate.wide_ep import validate_wide_ep

    print_validation(validate_wide_ep(load_trace(trace), report=lambda line: click.echo(line, err=True)), as_json, True)
