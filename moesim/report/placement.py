"""The frontier of a placement: how much traffic leaves nodes against how uneven ranks are."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from moesim.report import replace_file


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
    for name, load, left in ours:
        axes.annotate(name.removeprefix("slack "), (load, left), textcoords="offset points", xytext=(6, 6), fontsize=8)
    for marker, (name, load, left) in zip("sD^", [point for point in points if point not in ours], strict=False):
        axes.plot([load], [left], marker, color="#8d99ae", label=name)
    axes.set_xlabel("fullest rank over the mean rank, requests held out")
    axes.set_ylabel("transitions to another node")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def write_frontier(points: Sequence[tuple[str, float, float]], path: Path) -> None:
    """The plot as a file, PNG or SVG by its name."""
    content = BytesIO()
    frontier(points).savefig(content, format=path.suffix.lstrip(".") or "png", dpi=150)
    replace_file(path, content.getvalue())
