"""The frontier of a placement: traffic that leaves nodes against uneven ranks; and how uneven these are over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from moesim.optimize.rebalance import Outcome
from moesim.report import write_figure


def frontier(points: Sequence[tuple[str, float, float]]) -> Figure:
    """A line through the placements of growing slack, others beside it.

    points: name, fullest rank over the mean, share of transitions to other nodes.
    """
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    ours = [point for point in points if point[0].startswith("slack")]
    axes.plot(
        [load for _, load, _ in ours], [left for _, _, left in ours], "o-", color="#2a6f97", label="annealed, by slack"
    )
    labels: dict[tuple[float, float], list[str]] = {}  # slacks that lead to the same point share a label
    for name, load, left in ours:
        labels.setdefault((round(load, 3), round(left, 4)), []).append(name.removeprefix("slack "))
    for at, names in labels.items():
        axes.annotate(", ".join(names), at, textcoords="offset points", xytext=(6, 6), fontsize=8)
    for marker, (name, load, left) in zip("sD^", [point for point in points if point not in ours], strict=False):
        axes.plot([load], [left], marker, color="#8d99ae", label=name)
    axes.set_xlabel("fullest rank over the mean rank, requests held out")
    axes.set_ylabel("transitions to another node")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def drift(outcomes: Sequence[Outcome], tick_s: float) -> Figure:
    """The fullest rank over time, a line for each plan."""
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    colors = {"never": "#8d99ae", "EPLB": "#e07a5f", "Hecate": "#b5838d", "oracle": "#c9c9c9"}
    for outcome in outcomes:
        minutes = np.arange(len(outcome.fullest_K)) * tick_s / 60
        name = outcome.plan.name
        axes.plot(minutes, outcome.fullest_K, color=colors.get(name, "#2a6f97" if name == "ours" else None), lw=1.2,
                  label=f"{name}: {outcome.iteration_s * 1e3:.2f} ms an iteration")  # fmt: skip
    axes.set_xlabel("minutes")
    axes.set_ylabel("fullest rank over the mean rank")
    axes.set_ylim(bottom=0.98)
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    return figure


def write_frontier(points: Sequence[tuple[str, float, float]], path: Path) -> None:
    """The plot as a file of the kind that its name ends in."""
    write_figure(frontier(points), path)


def write_drift(outcomes: Sequence[Outcome], tick_s: float, path: Path) -> None:
    """The plot as a file of the kind that its name ends in."""
    write_figure(drift(outcomes, tick_s), path)
