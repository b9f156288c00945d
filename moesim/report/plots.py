"""The pictures of a report, as SVG text that can stand inside a page.

A part has one colour in every picture. Each picture is a function from results to a figure, or None
where it has nothing to show. The same results give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from moesim.report.tables import (
    MEMORY_PARTS,
    PROVENANCE,
    between,
    label_of,
    main_metric,
    number,
    ordered,
    parts_of,
    percent,
    phases_of,
    quantity,
    unit_of,
)  # fmt: skip
from moesim.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, RULE = "#1f2933", "#66727f", "#d9dee3"
COLOURS = {
    "attention": "#3f6fb0", "weights": "#3f6fb0", "allreduce": "#2a9d8f", "all_reduce": "#2a9d8f",
    "dense": "#d9b23d", "mlp": "#d9b23d", "router": "#9cc3e6", "gate": "#9cc3e6", "shared": "#f4c18d",
    "shared_experts": "#f4c18d", "dispatch": "#4f9d5a", "combine": "#97cf8f", "experts": "#e8833a",
    "cpu_experts": "#b85f1d", "expert_load": "#9a6fb0", "expert_loads": "#9a6fb0", "copy": "#9a6fb0",
    "miss": "#9a6fb0", "misses": "#9a6fb0", "expert_cache": "#9a6fb0", "prefetch": "#c7a8d6",
    "imbalance": "#cf4a4a", "wait": "#e59a9a", "queue": "#e59a9a", "bubble": "#8c96a1", "pipeline": "#8c96a1",
    "embedding": "#c9b79c", "head": "#b39b78", "host": "#8f99a3", "overhead": "#b4bcc4", "launch": "#b4bcc4",
    "other": "#ccd3d9",
    "kv_cache": "#63b3b8", "kv": "#63b3b8", "activations": "#e7a6b5", "buffers": "#b4bcc4",
    "measured_fraction": "#3d8f6e", "fitted_fraction": "#5b9bd5", "datasheet_fraction": "#e3b04b",
    "assumed_fraction": "#d07a6a",
}  # fmt: skip
SPARE = ("#7a5c99", "#5f8f3f", "#b0568a", "#4b8aa6", "#a3843b", "#6a7fd1", "#88776b", "#3c7a5d")
SETUPS = ("#2f5d9b", "#e0752b", "#3d8f5c", "#b5434a", "#7d5ba6", "#1f9aa0", "#a08021", "#c2649a")
STYLE: dict[str, Any] = {
    "svg.hashsalt": "moesim", "svg.fonttype": "none", "text.parse_math": False, "text.usetex": False,
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.edgecolor": RULE, "axes.labelcolor": FAINT, "text.color": INK,
    "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": FAINT, "ytick.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": RULE, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "legend.frameon": False, "legend.handlelength": 1.0, "legend.handleheight": 1.0,
}  # fmt: skip
MOST_POINTS = 1000


def draw(name: str, results: Sequence[Result]) -> str:
    """One picture by its name in PLOTS, as an <svg> element; empty where there is nothing to show."""
    return svg(name, lambda: PLOTS[name](results))


def svg(name: str, figure_of: Callable[[], Figure | None]) -> str:
    """A figure in the style of the report as an <svg> element with ids of its own; empty where there is none."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast(Any, STYLE))
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure = figure_of()
        if figure is None:
            return ""
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    picture = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    picture = picture[picture.index("<svg") :]

    def inside(tag: re.Match[str]) -> str:  # names are unique in the page, and nothing points out of it
        own = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag[0])
        return re.sub(r' xmlns(:\w+)?="[^"]*"', "", own)

    return re.sub(r"<[^>]*>", inside, picture).strip()


def colours_of(parts: Sequence[str]) -> dict[str, str]:
    """Part -> colour; parts without a colour of their own take the spare ones in turn."""
    unknown = [part for part in parts if part not in COLOURS]
    return {**COLOURS, **{part: SPARE[index % len(SPARE)] for index, part in enumerate(unknown)}}


def throughput(results: Sequence[Result]) -> Figure | None:
    """Bars of the ranking metric, with whiskers where it has an interval."""
    metric = main_metric(results)
    shown = [result for result in results if metric is not None and math.isfinite(result.metrics.get(metric, math.nan))]
    if metric is None or not shown:
        return None
    size, sign = unit_of(metric, [result.metrics[metric] for result in shown])
    values = [result.metrics[metric] / size for result in shown]
    best = (max if metric.endswith("_per_s") else min)(values)
    figure, axes = _bars(len(shown))
    colours = [SETUPS[0] if value == best else "#9db8d9" for value in values]
    axes.barh(range(len(shown)), values, height=0.6, color=colours)
    ends = list(values)
    for y, (result, value) in enumerate(zip(shown, values, strict=True)):
        interval = result.intervals.get(metric)
        if interval:
            low, high = interval[0] / size, interval[1] / size
            axes.plot([low, high], [y, y], color=INK, linewidth=1.2)
            for end in (low, high):
                axes.plot([end, end], [y - 0.13, y + 0.13], color=INK, linewidth=1.2)
            ends[y] = max(value, high)
        own = unit_of(metric, [result.metrics[metric]])
        text = quantity(result.metrics[metric], own) + (f"  {between(interval, own)}" if interval else "")
        axes.annotate(text, (ends[y], y), (8, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, max(ends) * 1.3 or 1)
    _finish_bars(axes, [result.name for result in shown], f"{label_of(metric)}{f', {sign}' if sign else ''}")
    return figure


def iteration(results: Sequence[Result]) -> Figure | None:
    """For each phase, the parts of one iteration, stacked; as shares too where one set-up dwarfs another."""
    colours = colours_of(parts_of([table for result in results for table in result.breakdown_s.values()]))
    panels: list[tuple[str, str, list[dict[str, float]], list[str]]] = []
    for phase in phases_of(results):
        tables = [result.breakdown_s.get(phase, {}) for result in results]
        totals = [math.fsum(table.values()) for table in tables]
        size, sign = unit = unit_of("iteration_s", totals)
        ends = [quantity(total, unit) if total else "none" for total in totals]
        panels.append((phase, sign, [_divided(table, size) for table in tables], ends))
        some = [total for total in totals if total]
        if max(some) > 4 * min(some):
            shares = [_divided(table, (total or 1) / 100) for table, total in zip(tables, totals, strict=True)]
            panels.append((f"{phase}, as shares", "% of the iteration", shares, [""] * len(results)))
    if not panels:
        return None
    figure, grid = _bars((len(results) + 1.3) * len(panels) - 1.0, len(panels))
    for (title, label, shown, texts), axes in zip(panels, np.atleast_1d(grid), strict=True):
        reached = _stack(axes, shown, parts_of(shown), colours)
        for y, (end, text) in enumerate(zip(reached, texts, strict=True)):
            axes.annotate(text, (end, y), (8, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, max(reached) * 1.12)
        axes.set_title(title)
        _finish_bars(axes, [result.name for result in results], label)
    _legend(figure, parts_of(table for panel in panels for table in panel[2]), colours)
    return figure


def memory(results: Sequence[Result]) -> Figure | None:
    """What fills the fullest device of each set-up, with a mark at what it has."""
    size = 2.0**30
    tables = [_divided({k: v for k, v in r.memory_bytes.items() if k != "capacity"}, size) for r in results]
    parts = parts_of(tables, MEMORY_PARTS)
    if not parts:
        return None
    colours = colours_of(parts)
    figure, axes = _bars(len(results))
    ends = _stack(axes, tables, parts, colours)
    capacities = [result.memory_bytes.get("capacity", 0.0) / size for result in results]
    for y, (end, capacity) in enumerate(zip(ends, capacities, strict=True)):
        text = f"{number(end)} GiB"
        if capacity:
            axes.plot([capacity, capacity], [y - 0.42, y + 0.42], color=INK, linewidth=2)
            text = f"{number(end)} of {number(capacity)} GiB" + (", does not fit" if end > capacity else "")
        axes.annotate(text, (max(end, capacity), y), (8, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, max(*ends, *capacities) * 1.22)
    _finish_bars(axes, [result.name for result in results], "GiB on the fullest device; the line is its capacity")
    _legend(figure, parts, colours)
    return figure


def provenance(results: Sequence[Result]) -> Figure | None:
    """Share of the busy time by the kind of number it rests on."""
    shown = [result for result in results if any(result.provenance.values())]
    if not shown:
        return None
    names = ordered((name for result in shown for name in result.provenance), PROVENANCE)
    colours = colours_of(names)
    figure, axes = _bars(len(shown))
    _stack(axes, [_divided(r.provenance, 0.01) for r in shown], names, colours)
    axes.set_xlim(0, 100)
    _finish_bars(axes, [result.name for result in shown], "% of busy time")
    _legend(figure, names, colours)
    return figure


def load(results: Sequence[Result]) -> Figure | None:
    """Load of each layer and rank over the mean of its layer; beside it the fullest rank of each layer."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    shown = [result for result in results if has_load(result)]
    if not shown:
        return None
    ratios = []
    for result in shown:
        load_LR = np.array(result.load_LR, dtype=float)
        mean_L = load_LR.mean(axis=1, keepdims=True)
        ratios.append(np.divide(load_LR, mean_L, out=np.zeros_like(load_LR), where=mean_L > 0))
    most = max(float(ratio.max()) for ratio in ratios)
    norm = TwoSlopeNorm(1.0, 0.0, min(max(most, 1.5), 4.0))
    num_columns = min(2, len(shown))
    num_rows = -(-len(shown) // num_columns)
    row_in = min(4.4, max(2.4, 1.2 + 0.05 * max(len(ratio) for ratio in ratios)))
    figure = new_figure(row_in * num_rows + 0.7)
    widths = [4.0, 1.0] * num_columns if num_columns > 1 else [7.0, 1.0]
    grid = figure.add_gridspec(num_rows, 2 * num_columns, width_ratios=widths)
    for index, (result, ratio) in enumerate(zip(shown, ratios, strict=True)):
        row, column = divmod(index, num_columns)
        axes = figure.add_subplot(grid[row, 2 * column])
        image = axes.imshow(ratio, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="none")
        axes.set_title(_short(result.name, 44))
        axes.set(xlabel="rank", ylabel="MoE layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        worst_L = ratio.max(axis=1)
        beside = figure.add_subplot(grid[row, 2 * column + 1], sharey=axes)
        beside.barh(range(len(worst_L)), worst_L - 1.0, left=1.0, height=1.0, color="#d98c80")
        beside.set_xlim(1.0, max(most, 1.5) * 1.02)
        beside.set_xlabel("max / mean")
        beside.set_title(f"mean {number(float(worst_L.mean()))}", fontweight="normal", fontsize=9)
        beside.tick_params(axis="y", left=False, labelleft=False)
        if index == 0:
            first = image
    bar = figure.colorbar(first, ax=figure.axes, location="bottom", shrink=0.4, aspect=40, pad=0.03)
    ticks = [0.0, 0.5, 1.0, *(tick for tick in (1.5, 2.0, 3.0, 4.0) if tick <= (norm.vmax or 1.0))]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.set_label("load over the mean of its layer")
    bar.outline.set_visible(False)
    return figure


def steps(results: Sequence[Result]) -> Figure | None:
    """Seconds of each decode iteration; of long runs the mean of neighbours, with their range as a band."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    shown = [(index, result) for index, result in enumerate(results) if result.step_s]
    values = [value for _, result in shown for value in result.step_s if value > 0]
    if not values:
        return None
    size, sign = unit_of("step_s", values)
    figure = new_figure(3.4)
    axes = figure.add_subplot()
    for index, result in shown:
        step_S = np.array(result.step_s) / size
        colour = SETUPS[index % len(SETUPS)]
        starts = np.unique(np.linspace(0, len(step_S), min(MOST_POINTS, len(step_S)), endpoint=False).astype(int))
        mean_S = np.add.reduceat(step_S, starts) / np.diff([*starts, len(step_S)])
        if len(starts) < len(step_S):
            low_S, high_S = np.minimum.reduceat(step_S, starts), np.maximum.reduceat(step_S, starts)
            axes.fill_between(starts, low_S, high_S, color=colour, alpha=0.18, linewidth=0)
        marker = "o" if len(starts) == 1 else None
        axes.plot(starts, mean_S, color=colour, linewidth=1.3, marker=marker, label=_short(result.name, 40))
    if max(values) > 8 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", left=False)
    else:
        axes.set_ylim(0, max(values) / size * 1.08)
    axes.grid(axis="y")
    axes.margins(x=0.01)
    axes.set(xlabel="decode iteration", ylabel=sign)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def has_load(result: Result) -> bool:
    """Whether the result has a load that could be uneven: more than one rank, and tokens."""
    return bool(result.load_LR) and len(result.load_LR[0]) > 1 and any(map(any, result.load_LR))


PLOTS: Mapping[str, Callable[[Sequence[Result]], Figure | None]] = {
    "throughput": throughput,
    "iteration": iteration,
    "steps": steps,
    "load": load,
    "memory": memory,
    "provenance": provenance,
}


def new_figure(height_in: float) -> Figure:
    """An empty figure as wide as the page."""
    from matplotlib.figure import Figure

    return Figure(figsize=(11.0, height_in), layout="constrained")


def _bars(num_bars: float, num_rows: int = 1) -> tuple[Figure, Any]:
    figure = new_figure(1.15 + 0.52 * num_bars + 0.5 * (num_rows - 1))
    return figure, figure.subplots(num_rows, 1)


def _stack(
    axes: Axes, tables: Sequence[Mapping[str, float]], parts: Sequence[str], colours: Mapping[str, str]
) -> list[float]:
    """Draw one stacked bar per table; where each one ends."""
    ends = [0.0] * len(tables)
    totals = [math.fsum(table.values()) for table in tables]
    for part in parts:
        widths = [table.get(part, 0.0) for table in tables]
        axes.barh(range(len(tables)), widths, left=ends, height=0.6, color=colours[part], edgecolor="white", lw=0.6)
        for y, width in enumerate(widths):
            if width > 0.055 * max(totals):
                share, ink = percent(width / totals[y]), _ink_on(colours[part])
                axes.text(ends[y] + width / 2, y, share, ha="center", va="center", fontsize=8.5, color=ink)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    return ends


def _finish_bars(axes: Axes, names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), [textwrap.fill(_short(name, 46), 24) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(axis="x")
    axes.set_xlabel(label)


def _divided(table: Mapping[str, float], size: float) -> dict[str, float]:
    return {part: value / size for part, value in table.items()}


def _legend(figure: Figure, parts: Sequence[str], colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colours[part], label=label_of(part)) for part in parts]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(8, len(parts)), columnspacing=1.4)


def _ink_on(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return INK if 0.3 * red + 0.59 * green + 0.11 * blue > 165 else "white"


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
