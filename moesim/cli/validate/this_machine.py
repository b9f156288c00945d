"""`moesim validate this-machine`: a real MoE model on this CPU, predicted from timings of its parts."""

from __future__ import annotations

import click

from moesim.cli.validate.printing import print_validation


@click.command("this-machine")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--all", "all_cases", is_flag=True, help="Print every case.")
@click.option("--seed", default=0, show_default=True, help="Of weights, sizes, routing and the order of timings.")
@click.option(
    "--budget",
    "budget_s",
    default=270.0,
    show_default=True,
    type=click.FloatRange(min=5),
    help="Seconds for all of it. Where it is short, the second model is left out, then fine steps of the table.",
)
def this_machine_command(as_json: bool, all_cases: bool, seed: int, budget_s: float) -> None:
    """Time parts and passes of MoE models on one thread of this CPU; predict the passes from the parts.

    Seconds are of CPU time; errors on the wall are among the facts.
    """
    from moesim.cli.profile.run import timing_bar
    from moesim.validate.this_machine import validate_this_machine

    try:
        with timing_bar("timing in shuffled rounds") as report:
            found = validate_this_machine(budget_s, seed, report=report)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"timing this machine needs {error.name}, which is not installed; run: pip install 'moesim[capture]'"
        ) from error
    print_validation(found, as_json, all_cases)
