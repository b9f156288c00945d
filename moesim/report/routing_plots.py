"""Pictures of load, locality, caches and requests of a routing trace: functions from what was measured to a figure.

A figure is None where the trace has nothing to show in it. The same trace gives the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.report.plots import FAINT, INK, SETUPS, new_figure
from moesim.report.routing import Measured
from moesim.routing.load import Floats, distinct_experts_L, expert_load_LE, rank_imbalance_L
from moesim.routing.reuse import miss_ratios
from moesim.routing.topics import topics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCH_COLOURS = "YlGnBu"
BLUE, ORANGE, GREEN = SETUPS[:3]


def load(measured: Measured) -> Figure | None:
    """Load of each layer's experts over their mean, the busiest first; beside it the busiest of each layer."""
    from matplotlib.colors import TwoSlopeNorm

    load_LE = -np.sort(-expert_load_LE(measured.trace), axis=1)
    ratio_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
    most = max(1.5, float(ratio_LE.max()))
    figure = new_figure(min(4.8, 1.9 + 0.1 * len(ratio_LE)))
    axes, beside = figure.subplots(1, 2, width_ratios=[6, 1], sharey=True)
    image = axes.imshow(
        ratio_LE, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, min(most, 4.0)), interpolation="none"
    )
    axes.set(xlabel="experts of each layer, busiest first")
    layer_ticks(axes.yaxis, measured)
    axes.set_ylabel("layer")
    beside.barh(range(len(ratio_LE)), ratio_LE[:, 0] - 1, left=1.0, height=0.85, color="#d98c80")
    beside.set(xlim=(1.0, most * 1.03), xlabel="busiest / mean")
    beside.tick_params(axis="y", left=False, labelleft=False)
    bar = figure.colorbar(image, ax=[axes, beside], location="right", aspect=24, pad=0.02)
    ticks = [0.0, 0.5, 1.0, *(tick for tick in (1.5, 2.0, 3.0, 4.0) if tick <= min(most, 4.0))]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.set_label("load over the mean of its layer")
    bar.outline.set_visible(False)
    return figure


def ranks(measured: Measured) -> Figure | None:
    """For each expert-parallel size, the busiest rank over the mean by layer: whole trace, and batches."""
    trace = measured.trace
    if not measured.ep:
        return None
    figure = new_figure(3.3)
    for axes, ep in zip(figure.subplots(1, len(measured.ep), squeeze=False)[0], measured.ep, strict=True):
        curves = {f"batch {batch}": rank_imbalance_L(trace, ep, batch) for batch in measured.batches}
        for (label, values_L), colour in zip(curves.items(), shades(len(curves)), strict=True):
            if np.isfinite(values_L).all():
                axes.plot(values_L, color=colour, label=label)
        axes.plot(rank_imbalance_L(trace, ep), color=INK, linestyle="--", label="whole trace")
        held = trace.num_experts // ep
        axes.set(title=f"EP {ep}: {held} expert{'s' if held > 1 else ''} a rank", ylabel="busiest rank / mean")
        axes.set_ylim(1.0)
        by_layer(axes, measured)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=8)
    return figure


def distinct(measured: Measured) -> Figure | None:
    """Distinct experts by batch size: mean over layers and their range, against even routing."""
    trace = measured.trace
    sizes = [2**power for power in range(11) if 2**power <= measured.num_requests]
    pairs = [distinct_experts_L(trace, size) for size in sizes]
    kept = [(size, values_L, even) for size, (values_L, even) in zip(sizes, pairs, strict=True) if values_L[0] > 0]
    if len(kept) < 2:
        return None
    x, even = [size for size, _, _ in kept], [even for _, _, even in kept]
    values_BL = np.stack([values_L for _, values_L, _ in kept])
    figure = new_figure(3.1)
    axes = figure.subplots()
    axes.plot(x, even, color=FAINT, linestyle="--", label="even, independent routing")
    axes.fill_between(x, values_BL.min(axis=1), values_BL.max(axis=1), color=BLUE, alpha=0.16, lw=0)
    axes.plot(x, values_BL.mean(axis=1), color=BLUE, marker="o", ms=4, label="this trace: mean and range of layers")
    axes.axhline(trace.num_experts, color=FAINT, lw=0.8)
    axes.annotate(f"all {trace.num_experts}", (x[0], trace.num_experts), (0, -11), textcoords="offset points")
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(size) for size in x])
    axes.set(xlabel="requests that decode together", ylabel="distinct experts of a layer", ylim=(0, None))
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    return figure


def tokens(measured: Measured) -> Figure | None:
    """By layer, how often the top-1 repeats and how many experts are kept, against independent tokens."""
    found = measured.measures
    panels = {
        "top-1 repeats": ("top1_repeat_rate", BLUE),
        "experts shared with the previous token": ("set_overlap_fraction", ORANGE),
        "same top-1 for the same token elsewhere": ("token_affinity_rate", GREEN),
    }
    shown = {title: item for title, item in panels.items() if np.isfinite(found[item[0]]).any()}
    if not shown:
        return None
    figure = new_figure(2.9)
    for axes, (title, (name, colour)) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        against(axes, 100 * found[name], 100 * found[f"{name}_by_chance"], colour, "by chance")
        axes.set(title=title, ylabel="%")
        by_layer(axes, measured)
    return figure


def caches(measured: Measured) -> Figure | None:
    """Miss-ratio curves of LRU and of Belady's MIN over the size of the cache; requests in turn, and batched."""
    trace = measured.trace
    ways = list(measured.cache_batches())
    ways = ways if len(ways) <= 3 else [ways[0], ways[len(ways) // 2], ways[-1]]
    figure = new_figure(3.4)
    for axes, batch in zip(figure.subplots(1, len(ways), sharey=True, squeeze=False)[0], ways, strict=True):
        for curves_LC, colour, label in zip(
            miss_ratios(trace, batch), (BLUE, ORANGE), ("LRU", "Belady's MIN, the floor"), strict=True
        ):
            size_C, percent_LC = range(curves_LC.shape[1]), 100 * curves_LC
            axes.fill_between(size_C, percent_LC.min(axis=0), percent_LC.max(axis=0), color=colour, alpha=0.15, lw=0)
            axes.plot(size_C, percent_LC.mean(axis=0), color=colour, label=label)
        if batch is None:
            axes.plot([0, trace.num_experts], [100, 0], color=FAINT, linestyle="--", lw=1, label="even, independent")
            axes.axvline(trace.top_k, color=FAINT, lw=0.8)
            axes.annotate(f"K = {trace.top_k}", (trace.top_k, 2), (4, 0), textcoords="offset points", color=FAINT)
        axes.set(
            title="requests in turn" if batch is None else f"{batch} requests decode together",
            xlabel=f"experts of a layer in the cache, of {trace.num_experts}",
            xlim=(0, trace.num_experts),
            ylim=(0, 101),
        )
        axes.grid()
    first = figure.axes[0]
    first.set_ylabel("misses, % of uses")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return figure


def requests(measured: Measured) -> Figure | None:
    """How well apart topics are by their number; what the request explains, and drift, by layer."""
    found = measured.measures
    groups = topics(measured.trace)
    figure = new_figure(3.2)
    first, second, third = figure.subplots(1, 3)
    if groups.silhouette_by_number:
        number = list(groups.silhouette_by_number)
        first.plot(number, list(groups.silhouette_by_number.values()), color=BLUE, marker="o", ms=4, label="this trace")
        first.plot(
            number, list(groups.shuffled_by_number.values()), color=FAINT, linestyle="--", label="shuffled tokens"
        )
        first.set_xticks(number)
        first.legend(loc="best", fontsize=8.5)
    sizes = " + ".join(map(str, np.bincount(groups.topic_N)))
    title = f"{groups.num_topics} topics: {sizes} requests" if groups.num_topics > 1 else "no separate topics"
    first.set(
        title=title, xlabel="groups of requests (k-means)", ylabel="silhouette", ylim=(min(0, *first.get_ylim()), None)
    )
    first.grid(axis="y")
    second.plot(100 * found["request_explained_fraction"], color=BLUE)
    second.set(title="the request explains", ylabel="% of the choice of experts", ylim=(0, None))
    by_layer(second, measured)
    for name, colour, label in (("within", ORANGE, "in a request"), ("over", GREEN, "over requests")):
        values = found[f"drift_{name}_requests_bits"]
        if np.isfinite(values).all():
            third.plot(values, color=colour, label=label)
            third.plot(found[f"drift_{name}_requests_bits_by_chance"], color=colour, linestyle="--", lw=1)
    third.set(title="drift (dashed: random halves)", ylabel="Jensen-Shannon divergence, bits")
    third.set_ylim(0, 1.3 * third.get_ylim()[1])  # room for the legend
    if third.lines:
        third.legend(loc="upper left", fontsize=8.5, ncols=2)
    by_layer(third, measured)
    return figure


def against(axes: Axes, values_L: Floats, chance_L: Floats, colour: str, name: str) -> None:
    """A measure by layer, and what it would be by chance."""
    axes.plot(values_L, color=colour)
    axes.plot(chance_L, color=FAINT, linestyle="--", label=name)
    axes.set_ylim(0, float(np.nanmax([values_L, chance_L])) * 1.1)
    axes.legend(loc="upper right", fontsize=8.5)


def by_layer(axes: Axes, measured: Measured) -> None:
    """A grid, and layers below."""
    axes.set_xlabel("layer")
    axes.grid(axis="y")
    layer_ticks(axes.xaxis, measured)


def layer_ticks(axis: Any, measured: Measured) -> None:
    """Ticks at some layers, with their index in the whole model."""
    layers = measured.trace.layers
    step = max(1, -(-len(layers) // 8))
    axis.set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def shades(number: int) -> list[Any]:
    """Light to dark for small to large."""
    import matplotlib

    return [matplotlib.colormaps[BATCH_COLOURS](0.35 + 0.6 * i / max(1, number - 1)) for i in range(number)]
