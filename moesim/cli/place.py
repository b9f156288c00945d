"""`moesim place`: where the experts of a scenario should lie, and how good that is."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from moesim.optimize.choice import Chosen
    from moesim.optimize.demand import Demand
    from moesim.optimize.place import Placed
    from moesim.optimize.price import Price
    from moesim.optimize.problem import Problem
    from moesim.routing.trace import RoutingTrace
    from moesim.scenario import Scenario

LOOKS = {  # of a term: what a person would call it
    "load": "fullest rank over the mean, all tokens",
    "steps": "fullest rank over the mean, in each step",
    "rank": "transitions to another rank",
    "node": "transitions to another node",
    "rack": "transitions to another rack",
    "spread": "pairs of a token's experts in different nodes",
    "moved": "experts that must travel",
    "reach": "nodes that a token reaches in a layer",
    "fresh": "... that it was not in for the layer before",
}
SHARES = ("rank", "node", "rack", "spread", "moved")


@click.command("place")
@click.argument("scenario", type=click.Path(path_type=Path))
@click.option("--set", "changes", multiple=True, metavar="PATH=VALUE", help="Change one key; repeatable.")
@click.option("--method", default="annealed", help="How to search: see `moesim list methods`.")
@click.option(
    "--weights", "weighed", default="load=1", metavar="TERM=W,...",
    help="What is to be small: load, steps, rank, node, rack, spread, moved; time: of decode iterations, simulated.",
)  # fmt: skip
@click.option("--slack", type=float, default=0.05, help="How much less even than the most even, for traffic's sake.")
@click.option("--time-limit-s", type=float, default=60.0, help="Stop searching then, with the best so far.")
@click.option("--bound-limit-s", type=float, default=20.0, help="Prove for so long what no placement can do better.")
@click.option("--tokens-per-step", type=int, help="Tokens of a step, for the term of steps. Default: the requests'.")
@click.option("--per-rack", type=int, default=0, help="Ranks in a rack, for the term of racks.")
@click.option(
    "--rank", "unlike", multiple=True, metavar="R:KEY=VALUE,...",
    help="A rank unlike the others: its speed (1 is the fastest), its slots; as in 3:speed=0.5,slots=4. Repeatable.",
)  # fmt: skip
@click.option("--today", type=click.Path(path_type=Path), help="An expert map (JSON) that experts move from.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the expert map, EPLB's JSON.")
@click.option("--csv", "table", type=click.Path(path_type=Path), help="Write it as ExFlow's CSV.")
@click.option("--frontier", type=click.Path(path_type=Path), help="Draw traffic against balance (.png, .svg).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def place_command(
    scenario: Path, changes: tuple[str, ...], method: str, weighed: str, slack: float, time_limit_s: float,
    bound_limit_s: float, tokens_per_step: int | None, per_rack: int, unlike: tuple[str, ...], today: Path | None,
    output: Path | None, table: Path | None, frontier: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Place the experts of SCENARIO by the routing of half of its trace's requests, and judge that on the other half.

    Ctrl-C ends the search with the best placement so far. Slow ranks of [faults] are given less.
    """
    from moesim import verbs
    from moesim.files.placements import placement_csv, placement_json, read_placement
    from moesim.optimize.choice import choices
    from moesim.optimize.clock import Clock
    from moesim.optimize.demand import Demand
    from moesim.optimize.of_scenario import halves
    from moesim.optimize.place import place
    from moesim.report import check_target, replace_file

    for target in (output, table, frontier):
        if target:
            check_target(target)
    base = verbs.load(scenario, changes)[0]
    before = read_placement(today, base.layout.experts.ep) if today else None
    problem = _problem(base, slack, per_rack, unlike, None if before is None else before.slot_expert_LP)
    known, others = halves(base)
    given = _weights(weighed)
    if unlike and given.get("time"):
        raise ValueError(
            "--weights time: the simulator knows nothing of --rank; give slow ranks as [faults], or weigh other terms"
        )
    problem, price = _weighed(problem, given, base, known)
    per_step = base.workload.num_requests if tokens_per_step is None else tokens_per_step
    fit, heldout = (Demand.of(part, None, per_step) for part in (known, others))
    clock = Clock(time_limit_s)
    with clock.asked_by_ctrl_c():
        placed = place(problem, fit, heldout, method=method, clock=clock, bound_s=bound_limit_s)
    placement = problem.as_placement(placed.slot_LP)
    if output:
        replace_file(output, placement_json(placement, problem.num_experts).encode())
    if table:
        replace_file(table, placement_csv(placement, problem.num_experts).encode())
    if frontier:
        from moesim.report.placement import write_frontier

        write_frontier(frontier_of(problem, fit, heldout, method, time_limit_s), frontier)
    simulated = {} if unlike else _simulated(base, placed)
    chosen = choices(problem, placed.slot_LP, heldout) if problem.num_slots > problem.num_experts else {}
    if as_json:
        more = {
            "simulated_tpot_s": simulated,
            "price": vars(price) if price else None,
            "replica_choices": {name: vars(choice) for name, choice in chosen.items()},
        }
        click.echo(json.dumps({**placed.as_json(), **more}, indent=2))
    else:
        _print(placed, simulated, price, chosen)
    for path in (output, table, frontier):
        if path:
            click.echo(f"written: {path}", err=True)
    if placed.cut_short == "interrupted":
        sys.exit(130)


def _weights(text: str) -> dict[str, float]:
    from moesim.optimize.problem import Weights

    known, given = [*(item.name for item in fields(Weights)), "time"], {"load": 0.0}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            given[name.strip()] = float(value or 1.0)
        except ValueError:
            raise ValueError(f"--weights {text}: {part!r} must be TERM=NUMBER, as in node=1,load=0.2") from None
        if name.strip() not in known:
            raise ValueError(f"--weights {text}: unknown {name.strip()!r}; one of {', '.join(known)} would do")
    return given


def _weighed(
    problem: Problem, given: dict[str, float], base: Scenario, known: RoutingTrace
) -> tuple[Problem, Price | None]:
    """The problem with its weights; time is priced by simulating."""
    from moesim.optimize.price import price_of
    from moesim.optimize.problem import Weights

    time, price = given.pop("time", 0.0), None
    if time:
        price = price_of(base, problem, known)
        for name, value in vars(price.weights).items():
            given[name] = given.get(name, 0.0) + time * value
    problem = replace(problem, weights=Weights(**given))
    if found := problem.mistakes():
        raise ValueError("\n".join(found))
    return problem, price


def _problem(
    base: Scenario, slack: float, per_rack: int, unlike: tuple[str, ...], today: np.ndarray | None
) -> Problem:  # fmt: skip
    """The placement problem of a scenario, with what is said of single ranks."""
    from moesim.optimize.of_scenario import problem_of

    problem = problem_of(base, slack, per_rack)
    slots_R, speed_R = problem.slots_R.copy(), problem.speed_R.copy()
    for text in unlike:
        rank, given = _unlike(text, problem.num_ranks)
        _check_room(base, text, int(slots_R[rank]), int(given.get("slots", 0)))
        slots_R[rank] = given.get("slots", slots_R[rank])
        speed_R[rank] = given.get("speed", speed_R[rank])
    return replace(problem, slots_R=slots_R, speed_R=speed_R / speed_R.max(), today=today)


def _check_room(base: Scenario, text: str, slots: int, wanted: int) -> None:
    """Whether a rank's memory has room for so many slots in each layer in place of what all have."""
    used = base.memory_bytes()
    free, each = used.pop("capacity") - sum(used.values()), used["experts"] / slots
    if (wanted - slots) * each > free:
        raise ValueError(
            f"--rank {text}: {wanted} slots in each layer need {(wanted - slots) * each / 2**30:.1f} GiB more than "
            f"{slots}, and {free / 2**30:.1f} GiB are free; {slots + int(free / each)} slots would do"
        )


def _unlike(text: str, ranks: int) -> tuple[int, dict[str, float]]:
    """A rank and what is said of it."""
    rank, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",")]
    try:
        found = int(rank), {key.strip(): (int if key.strip() == "slots" else float)(value) for key, _, value in pairs}
    except ValueError:
        raise ValueError(f"--rank {text}: must be R:KEY=NUMBER,... as in 3:speed=0.5,slots=4") from None
    if not 0 <= found[0] < ranks:
        raise ValueError(f"--rank {text}: there is no rank {found[0]}; 0 to {ranks - 1} would do")
    if wrong := set(found[1]) - {"speed", "slots"}:
        raise ValueError(f"--rank {text}: unknown {', '.join(sorted(wrong))}; speed and slots would do")
    return found


def _simulated(base: Scenario, placed: Placed) -> dict[str, float]:
    """Seconds per output token of the scenario (requests held out) with the placement and with two others."""
    from moesim.estimate import estimate

    variants = {
        placed.method: replace(base, placement=placed.problem.as_placement(placed.slot_LP)),
        # the same requests for all: those whose load is not known beforehand
        "contiguous": replace(base, placement=_contiguous(placed.problem, len(placed.slot_LP))),
        "eplb": replace(base, placement=None, policies=replace(base.policies, placement="eplb")),
    }
    return {name: estimate(variant, "value", 0).metrics["tpot_s"] for name, variant in variants.items()}


def _contiguous(problem: Problem, num_layers: int):  # type: ignore[no-untyped-def]
    import numpy as np

    from moesim.policies.placement import Contiguous

    load_LE = np.zeros((num_layers, problem.num_experts))
    return Contiguous().place(problem.num_slots, problem.num_ranks, problem.per_node, load_LE)


def frontier_of(
    problem: Problem, fit: Demand, heldout: Demand, method: str, time_limit_s: float
) -> list[tuple[str, float, float]]:
    """What is held out of each placement: name or slack, fullest rank over the mean, transitions to other nodes."""
    from moesim.optimize.clock import Clock
    from moesim.optimize.methods import METHODS
    from moesim.optimize.problem import Weights
    from moesim.optimize.score import scored

    found = []
    for name in ("contiguous", "eplb", "swaps"):
        score = scored(problem, METHODS[name].place(problem, fit, Clock()), heldout)
        found.append((name, score.load, score.node))
    for slack in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        weighed = replace(problem, slack=slack, weights=Weights(load=0.0, node=1.0), today=None)
        score = scored(problem, METHODS[method].place(weighed, fit, Clock(time_limit_s)), heldout)
        found.append((f"slack {slack:.0%}", score.load, score.node))
    return found


def _print(placed: Placed, simulated: dict[str, float], price: Price | None, chosen: dict[str, Chosen]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    problem, console = placed.problem, Console()
    console = console if console.is_terminal else Console(width=110)
    weights = {item.name: getattr(problem.weights, item.name) for item in fields(problem.weights)}
    said = ", ".join(f"{name} {value:g}" for name, value in weights.items() if value)
    console.print(
        f"{problem.num_experts} experts of {len(placed.slot_LP)} layers in {problem.num_slots} slots on "
        f"{problem.num_ranks} ranks, {problem.num_nodes} nodes; weights: {said}"
    )
    table = Table(
        box=box.SIMPLE_HEAD, title=f"On requests held out, by {placed.method} and others", title_justify="left"
    )
    table.add_column("")
    names = list(placed.heldout)
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("proven bound*", justify="right")
    for term, words in LOOKS.items():
        values = [getattr(placed.heldout[name], term) for name in names]
        if all(value == 0 or value != value for value in values):
            continue
        bound = placed.bounds.get(term)
        cells = [_said(term, value) for value in values]
        table.add_row(words, *cells, "" if bound is None else _said(term, bound))
    if simulated:
        table.add_row("simulated time per output token", *(f"{simulated[name] * 1e3:.2f} ms" for name in names), "")
    console.print(table)
    if chosen:
        console.print(_copies(chosen))
    if price:
        console.print(
            f"priced by simulating: {price.even_s * 1e3:.3f} ms an iteration, {price.steps_s * 1e3:.3f} ms for each 1 "
            f"of the fullest rank above the mean, {price.spread_s * 1e3:.3f} ms if all pairs lay in different nodes; "
            f"off by up to {price.error:.1%}"
        )
    if placed.oracle_steps == placed.oracle_steps:
        console.print(
            f"headroom in steps: {placed.oracle_steps:.3f} if every step had a placement of its own (an oracle)"
        )
    gap = f"{placed.gap_fraction:.2%} above" if placed.lower_bound > 0 else "above"
    console.print(
        f"objective {placed.objective:.5g} on the requests it was made for, {gap} the proven bound "
        f"{placed.lower_bound:.5g}"
        + "".join(f", {name} {value:.5g}" for name, value in placed.baselines.items())
        + f"; {placed.seconds:.2f} s"
        + (f"; stopped: {placed.cut_short}" if placed.cut_short else "")
    )
    console.print("* of the requests that it was made for: no placement as even as the slack asks has less there")
    if placed.excess:
        console.print(f"the fullest rank or node is {placed.excess:.1%} above what the slack allows")


def _copies(chosen: dict[str, Chosen]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="Which copy a token goes to, at run time", title_justify="left")
    table.add_column("")
    for name in chosen:
        table.add_column(name, justify="right")
    table.add_row("fullest rank over the mean, in each step", *(f"{item.steps:.3f}" for item in chosen.values()))
    table.add_row("choices in another node than the token's", *(f"{item.away:.1%}" for item in chosen.values()))
    return table


def _said(term: str, value: float) -> str:
    return f"{value:.2%}" if term in SHARES else f"{value:.3f}"
