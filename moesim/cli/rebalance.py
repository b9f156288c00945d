"""`moesim rebalance`: when to place experts anew as traffic drifts, and what that is worth."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from moesim.optimize.rebalance import Outcome


@click.command("rebalance")
@click.argument("scenario", type=click.Path(path_type=Path))
@click.option("--set", "changes", multiple=True, metavar="PATH=VALUE", help="Change one key; repeatable.")
@click.option("--hours", type=float, default=2.0, show_default=True, help="How long, after 10 minutes before.")
@click.option("--around", type=float, default=1.0, show_default=True, help="So often traffic goes through the trace.")
@click.option("--width", type=float, default=0.1, show_default=True, help="How much of the trace is mixed at a time.")
@click.option("--tick-s", type=float, default=10.0, show_default=True, help="Load changes so often.")
@click.option("--every-s", type=float, multiple=True, help="Ours looks so often; repeatable. Default: 60.")
@click.option("--window-s", type=float, multiple=True, help="... at the load of so long; repeatable. Default: 60.")
@click.option("--worth", type=float, multiple=True, help="... and moves for so many times what it costs. Default: 1.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the fullest rank over time (.png, .svg).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def rebalance_command(
    scenario: Path, changes: tuple[str, ...], hours: float, around: float, width: float, tick_s: float,
    every_s: tuple[float, ...], window_s: tuple[float, ...], worth: tuple[float, ...], plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Let traffic drift through the requests of SCENARIO's trace, in their order, and place experts anew or never.

    Iterations take what the simulator says of the fullest rank; while experts travel over the machine's links, all
    ranks wait.
    """
    from moesim import verbs
    from moesim.optimize.demand import Demand
    from moesim.optimize.of_scenario import halves, problem_of
    from moesim.optimize.price import price_of
    from moesim.optimize.rebalance import PLANS, WARM_S, Rebalancing, drifting
    from moesim.optimize.score import spread_fraction
    from moesim.optimize.search import most_even
    from moesim.report import check_target

    if plot:
        check_target(plot)
    given = {"--hours": (hours,), "--tick-s": (tick_s,), "--width": (width,)}
    for name, values in (given | {"--every-s": every_s, "--window-s": window_s}).items():
        for value in values:
            if not value > 0:
                raise ValueError(f"{name} {value:g}: must be above 0")
    base = verbs.load(scenario, changes)[0]
    problem = problem_of(base)
    known = halves(base)[0]
    demand, price = Demand.of(known), price_of(base, problem, known)
    spread = spread_fraction(problem, most_even(problem, demand.load_LE), demand)  # placing by load leaves that alone
    price = replace(price, even_s=price.even_s + price.spread_s * spread)
    ticks = round((hours * 3600 + WARM_S) / tick_s)
    load_KLE = drifting(base.trace, base.workload.num_requests, ticks=ticks, around=around, width=width, seed=base.seed)
    study = Rebalancing(problem, price, base.model, base.cluster, load_KLE, tick_s)
    ours, plans = PLANS[-1], list(PLANS[:-1])
    asked = list(itertools.product(every_s or [ours.every_s], window_s or [ours.window_s], worth or [ours.worth]))
    plans += [
        replace(ours, name=ours.name if len(asked) == 1 else f"ours, every {e:g} s by {w:g} s, worth {x:g}",
                every_s=e, window_s=w, worth=x)
        for e, w, x in asked
    ]  # fmt: skip
    outcomes = [study.run(plan) for plan in plans] + [study.oracle()]
    if as_json:
        click.echo(json.dumps({"price": vars(price), "plans": [outcome.as_json() for outcome in outcomes]}, indent=2))
    else:
        _print(outcomes, base.name, hours)
    if plot:
        from moesim.report.placement import write_drift

        write_drift(outcomes, tick_s, plot)
        click.echo(f"written: {plot}", err=True)


def _print(outcomes: list[Outcome], name: str, hours: float) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=110)
    title = f"{name}: {hours:g} hours of drifting traffic"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("placed anew")
    for column in ("iteration", "over never", "fullest rank", "times", "experts moved", "time moving"):
        table.add_column(column, justify="right")
    first = outcomes[0].iteration_s
    for outcome in outcomes:
        table.add_row(
            outcome.plan.name, f"{outcome.iteration_s * 1e3:.3f} ms", f"{outcome.iteration_s / first - 1:+.1%}",
            f"{outcome.fullest_K.mean():.3f}", str(len(outcome.moved_at_s)), f"{outcome.moved:,}",
            f"{outcome.stalled:.3%}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "iteration: mean, with the time of moving; fullest rank: over the mean rank, mean of ticks and layers"
    )
    console.print("oracle: a placement for every tick by its own load, which nothing moves for")
