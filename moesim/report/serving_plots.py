"""The pictures of serving runs: functions from results to a figure, or None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moesim.report.plots import FAINT, INK, SETUPS, new_figure
from moesim.report.tables import unit_of
from moesim.serving.metrics import latencies
from moesim.serving.outcome import ITL_EDGES_S
from moesim.serving.results import ServingResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

TITLES = {
    "ttft": "TTFT: time to first token",
    "tpot": "TPOT: a request's mean time per output token",
    "itl": "ITL: each gap between tokens",
    "e2e": "E2E: arrival to last token",
}
OVER_TIME = {
    "running": ("running requests", 1.0),
    "waiting": ("waiting requests", 1.0),
    "kv_fraction": ("KV cache, % full", 0.01),
    "output_tokens_per_s": ("output tokens/s", 1.0),
    "imbalance": ("busiest rank / mean", 1.0),
    "instances": ("instances up", 1.0),
}
"""Sample of the timeline -> its words, and the size of its unit."""
MOST_POINTS, MOST_DOTS = 400, 700


def latency(results: Sequence[ServingResult]) -> Figure | None:
    """Share of the requests (of gaps, for ITL) within a latency; dashed: what is promised."""
    shown = [name for name in TITLES if any(len(_cdf(result, name)[0]) for result in results)]
    if not shown:
        return None
    figure = new_figure(2.9 * -(-len(shown) // 2) + 0.3)
    grid = figure.subplots(-(-len(shown) // 2), 2, squeeze=False).ravel()
    for axes, name in zip(grid, shown, strict=False):
        curves = [_cdf(result, name) for result in results]
        everything = np.concatenate([values for values, _ in curves])
        size, sign = unit_of("x_s", [float(np.median(everything))])
        for index, (values, percent) in enumerate(curves):
            if len(values):
                axes.plot(values / size, percent, color=_colour(index), label=results[index].name, linewidth=1.5)
        for index, result in enumerate(results):
            if name in result.promises:
                colour = INK if len({r.promises.get(name) for r in results}) == 1 else _colour(index)
                axes.axvline(result.promises[name] / size, color=colour, linestyle="--", linewidth=1)
        _stretch(axes, everything / size, "x")
        axes.set(title=TITLES[name], xlabel=sign, ylabel="% within", ylim=(0, 101))
        axes.grid()
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    _setups_legend(figure, results)
    return figure


def timeline(results: Sequence[ServingResult]) -> Figure | None:
    """What the instances did over simulated time."""
    shown = [name for name in OVER_TIME if any(_samples(result, name) for result in results)]
    shown = [name for name in shown if name != "instances" or _changes(results, name)]
    if not shown:
        return None
    figure = new_figure(1.9 * -(-len(shown) // 2) + 0.4)
    grid = figure.subplots(-(-len(shown) // 2), 2, squeeze=False, sharex=True).ravel()
    for axes, name in zip(grid, shown, strict=False):
        words, size = OVER_TIME[name]
        for index, result in enumerate(results):
            if _samples(result, name):
                time_s, values = _thinned(result.outcome.timeline["time_s"], result.outcome.timeline[name])
                axes.plot(time_s, values / size, color=_colour(index), linewidth=1.3)
        low = 1.0 if name == "imbalance" else 0.0
        axes.set(title=words, ylim=(low, max(axes.get_ylim()[1], low + 0.1) if name != "kv_fraction" else 103))
        axes.grid()
        axes.margins(x=0.01)
        axes.tick_params(labelbottom=True)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes in grid[max(0, len(shown) - 2) : len(shown)]:
        axes.set_xlabel("simulated seconds")
    _setups_legend(figure, results)
    return figure


def ttft_by_prompt(results: Sequence[ServingResult]) -> Figure | None:
    """Time to first token of single requests by the length of their prompt; of long runs, every n-th request."""
    dots = []
    for result in results:
        ttft_s_Q, prompt_Q = latencies(result.outcome)["ttft"], result.outcome.prompt_Q
        chosen_Q = np.flatnonzero(np.isfinite(ttft_s_Q) & (ttft_s_Q > 0))
        chosen_Q = chosen_Q[:: max(1, -(-len(chosen_Q) // MOST_DOTS))]
        dots.append((prompt_Q[chosen_Q].astype(float), ttft_s_Q[chosen_Q]))
    prompts, seconds = (np.concatenate(values) for values in zip(*dots, strict=True))
    if not len(seconds):
        return None
    size, sign = unit_of("x_s", [float(np.median(seconds))])
    num = min(3, len(results))
    figure = new_figure(3.2 * -(-len(results) // num) + 0.2)
    grid = figure.subplots(-(-len(results) // num), num, squeeze=False, sharex=True, sharey=True).ravel()
    for index, (axes, (prompt_Q, ttft_s_Q)) in enumerate(zip(grid, dots, strict=False)):
        axes.plot(prompt_Q, ttft_s_Q / size, ".", color=_colour(index), markersize=6, alpha=0.5, markeredgewidth=0)
        if "ttft" in results[index].promises:
            axes.axhline(results[index].promises["ttft"] / size, color=INK, linestyle="--", linewidth=1)
        _stretch(axes, prompts, "x")
        _stretch(axes, seconds / size, "y")
        axes.set(title=results[index].name, xlabel="prompt tokens", ylabel=f"TTFT, {sign}")
        axes.grid()
        axes.label_outer()
    for axes in grid[len(results) :]:
        axes.set_axis_off()
    return figure


def search(results: Sequence[ServingResult]) -> Figure | None:
    """Share of the requests within the SLO at every rate that was tried."""
    shown = [(index, result.search) for index, result in enumerate(results) if result.search and result.search.tried]
    if not shown:
        return None
    figure = new_figure(3.2)
    axes = figure.subplots()
    rates = []
    for index, found in shown:
        tried = sorted(found.tried, key=lambda item: item.rate_per_s)
        rates += [item.rate_per_s for item in tried]
        x, y = [item.rate_per_s for item in tried], [100 * item.attainment for item in tried]
        axes.plot(x, y, color=_colour(index), marker="o", markersize=4, linewidth=1.2)
        if found.rate_per_s is not None:
            axes.axvline(found.rate_per_s, color=_colour(index), linestyle=":", linewidth=1.2)
            at = found.rate_per_s, 4 + 11 * index
            axes.annotate(f"{found.rate_per_s:.3g}/s", at, (5, 0), textcoords="offset points", color=_colour(index))
    for target in sorted({found.target for _, found in shown}):
        axes.axhline(100 * target, color=INK, linestyle="--", linewidth=1)
    if max(rates) > 8 * min(rates):
        _stretch(axes, np.array(rates), "x")
    axes.set(xlabel="requests/s that arrive", ylabel="% within the SLO", ylim=(0, 103))
    axes.grid()
    _setups_legend(figure, results)
    return figure


SERVING_PLOTS: Mapping[str, Callable[[Sequence[ServingResult]], Figure | None]] = {
    "latency": latency,
    "timeline": timeline,
    "ttft_by_prompt": ttft_by_prompt,
    "search": search,
}


def _cdf(result: ServingResult, name: str) -> tuple[Floats, Floats]:
    """Latencies in order, and the % of requests (gaps) within each."""
    if name == "itl":
        counts = result.outcome.itl_counts
        if not counts.sum():
            return np.zeros(0), np.zeros(0)
        used = np.flatnonzero(counts)
        chosen = slice(used[0], used[-1] + 1)
        reached = 100 * np.cumsum(counts[chosen]) / counts.sum()
        return np.concatenate([ITL_EDGES_S[used[:1]], ITL_EDGES_S[1:][chosen]]), np.concatenate([[0.0], reached])
    values = latencies(result.outcome)[name]
    values = np.sort(values[np.isfinite(values)])
    percent = 100 * np.arange(1, len(values) + 1) / max(1, len(values))
    chosen_N = np.unique(np.linspace(0, len(values) - 1, min(MOST_POINTS, len(values))).astype(int))
    return values[chosen_N], percent[chosen_N]


def _samples(result: ServingResult, name: str) -> bool:
    values = result.outcome.timeline.get(name)
    return values is not None and bool(np.isfinite(values).any())


def _changes(results: Sequence[ServingResult], name: str) -> bool:
    return any(_samples(r, name) and np.ptp(r.outcome.timeline[name]) > 0 for r in results)


def _thinned(time_s: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Means of neighbours: no curve has more than `MOST_POINTS` points, and none where nothing is known."""
    starts = np.arange(0, len(values), -(-len(values) // MOST_POINTS))
    known = np.isfinite(values)
    sums, nums = np.add.reduceat(np.where(known, values, 0.0), starts), np.add.reduceat(known.astype(float), starts)
    ends = np.append(starts[1:], len(values)) - 1
    return time_s[ends][nums > 0], sums[nums > 0] / nums[nums > 0]


def _stretch(axes: Axes, values: Floats, which: str) -> None:
    """A logarithmic axis where the values span more than a factor of 8, else one from zero."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    positive = values[values > 0]
    axis = axes.xaxis if which == "x" else axes.yaxis
    if len(positive) and positive.max() > 8 * positive.min():
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        decades = np.log10(positive.max() / positive.min())
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    elif which == "x":
        axes.set_xlim(left=0)
    else:
        axes.set_ylim(bottom=0)


def _setups_legend(figure: Figure, results: Sequence[ServingResult]) -> None:
    from matplotlib.lines import Line2D

    if len(results) == 1:
        return
    handles = [Line2D([], [], color=_colour(index), label=result.name) for index, result in enumerate(results)]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(results)), labelcolor=FAINT)


def _colour(index: int) -> str:
    return SETUPS[index % len(SETUPS)]
