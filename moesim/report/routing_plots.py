"""The pictures of a routing trace, in the style of the report: each is a function from what was measured to a figure.

A figure is None where the trace has nothing to show in it. The same trace gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.report.plots import FAINT, INK, SETUPS, new_figure
from moesim.report.routing import Measured
from moesim.routing.load import Floats, Ints, distinct_experts_L, expert_load_LE, rank_imbalance_L
from moesim.routing.prediction import Recall, gate_recall, popularity_recall, table_recall
from moesim.routing.reuse import miss_ratios
from moesim.routing.statistics import HORIZONS
from moesim.routing.structure import coactivation_lift_LEE, transitions_LEE
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
    _layer_ticks(axes.yaxis, measured)
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
        for (label, values_L), colour in zip(curves.items(), _shades(len(curves)), strict=True):
            if np.isfinite(values_L).all():
                axes.plot(values_L, color=colour, label=label)
        axes.plot(rank_imbalance_L(trace, ep), color=INK, linestyle="--", label="whole trace")
        held = trace.num_experts // ep
        axes.set(title=f"EP {ep}: {held} expert{'s' if held > 1 else ''} a rank", ylabel="busiest rank / mean")
        axes.set_ylim(1.0)
        _by_layer(axes, measured)
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
        _against(axes, 100 * found[name], 100 * found[f"{name}_by_chance"], colour, "by chance")
        axes.set(title=title, ylabel="%")
        _by_layer(axes, measured)
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


def information(measured: Measured) -> Figure | None:
    """Mutual information between the top-1 experts of two layers, by layer and by horizon, and of shuffled tokens."""
    figure = new_figure(3.1)
    axes = figure.subplots()
    for horizon, colour in zip(HORIZONS, _shades(len(HORIZONS))[::-1], strict=True):
        name = "layer_information_bits" + ("" if horizon == 1 else f"_horizon_{horizon}")
        values = measured.measures.get(name, np.array([]))
        if len(values):
            label = "next layer" if horizon == 1 else f"{horizon} layers ahead"
            axes.plot(values, color=colour, marker="o", ms=3, label=label)
    if not axes.lines:
        return None
    by_chance = measured.measures["layer_information_bits_by_chance"]
    axes.plot(by_chance, color=FAINT, linestyle="--", label="shuffled tokens")
    axes.set(ylabel="bits", xlabel="from layer", ylim=(0, None))
    _layer_ticks(axes.xaxis, measured)
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=5)
    return figure


def transitions(measured: Measured) -> Figure | None:
    """Where the tokens of each top-1 expert go in the next layer: the layer pair with the most information."""
    trace, found = measured.trace, measured.measures
    if trace.num_layers < 2:
        return None
    layer = int(np.argmax(found["layer_information_bits"] - found["layer_information_bits_by_chance"]))
    counts_EE = transitions_LEE(trace)[layer].astype(np.float64)
    from_E, to_E = counts_EE.sum(axis=1), counts_EE.sum(axis=0)
    rows, columns = _matched(counts_EE)
    percent_EE = 100 * np.divide(counts_EE, from_E[:, None], out=np.zeros_like(counts_EE), where=from_E[:, None] > 0)
    by_chance_EE = np.broadcast_to(100 * to_E / to_E.sum(), counts_EE.shape)
    figure = new_figure(4.9)
    pair = f"layer {trace.layers[layer]} to {trace.layers[layer + 1]}"
    most = min(100.0, float(np.quantile(percent_EE.max(axis=1), 0.9)))
    for axes, shown_EE, title in zip(
        figure.subplots(1, 2),
        (percent_EE, by_chance_EE),
        (f"top-1 experts, {pair}", "if the layers knew nothing"),
        strict=True,
    ):
        image = axes.imshow(
            shown_EE[np.ix_(rows, columns)], cmap="Blues", norm=_square_root(most), interpolation="none"
        )
        axes.set(title=title, xlabel="to expert", ylabel="from expert", xticks=[], yticks=[])
    bar = figure.colorbar(image, ax=figure.axes, location="right", shrink=0.8, aspect=24, pad=0.02)
    bar.set_ticks([tick for tick in (0, 1, 5, 10, 20, 40, 70, 100) if tick <= 1.01 * most])
    bar.set_label("% of the tokens of the expert on the left")
    bar.outline.set_visible(False)
    return figure


def coactivation(measured: Measured) -> Figure | None:
    """Which experts one token chooses together, against chance; beside it, how much this tells by layer."""
    from matplotlib.colors import LogNorm

    trace, found = measured.trace, measured.measures
    if trace.top_k < 2:
        return None
    layer = int(np.argmax(found["coactivation_information_bits"]))
    lift_EE = coactivation_lift_LEE(trace)[layer]
    order = _side_by_side(np.nan_to_num(lift_EE))
    figure = new_figure(4.9)
    axes, beside = figure.subplots(1, 2)
    axes.set_facecolor("#e8ebee")
    shown_EE = np.clip(lift_EE[np.ix_(order, order)], 1 / 8, 8)
    image = axes.imshow(shown_EE, cmap="RdBu_r", norm=LogNorm(1 / 8, 8), interpolation="none")
    axes.set(
        title=f"pairs of experts, layer {trace.layers[layer]}", xlabel="expert", ylabel="expert", xticks=[], yticks=[]
    )
    bar = figure.colorbar(image, ax=axes, location="right", shrink=0.8, aspect=24, pad=0.02)
    bar.set_ticks((0.125, 0.25, 0.5, 1, 2, 4, 8), labels=["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])
    bar.minorticks_off()
    bar.set_label("times as often as by chance")
    bar.outline.set_visible(False)
    information_L = found["coactivation_information_bits"]
    _against(beside, information_L, found["coactivation_information_bits_by_chance"], BLUE, "shuffled choices")
    beside.set(title="what one expert of a token tells of another", ylabel="bits per pair")
    _by_layer(beside, measured)
    return figure


def prediction(measured: Measured) -> Figure | None:
    """Recall over width for each way to guess and each horizon; beside it, by layer, at width K."""
    trace = measured.trace
    if trace.num_layers < 2:
        return None
    figure = new_figure(3.7)
    axes, beside = figure.subplots(1, 2, sharey=True)
    widest = min(trace.num_experts, 4 * trace.top_k)
    popular = popularity_recall(trace)
    ways: list[tuple[str, Recall, str, str]] = []
    for horizon, style in zip(HORIZONS, ("-", "--", ":"), strict=True):
        if horizon >= trace.num_layers:
            continue
        ahead = "next layer" if horizon == 1 else f"{horizon} ahead"
        gate, table = gate_recall(trace, horizon), table_recall(trace, horizon)
        ways += [(f"gate, {ahead}", gate, BLUE, style)] if gate else []
        ways += [(f"transition table, {ahead}", table[0], ORANGE, style)] if table else []
    ways.sort(key=lambda way: way[2])
    for label, recall, colour, style in [*ways, ("popularity", popular, FAINT, "-")]:
        percent_LW = 100 * recall.recall_LW[:, :widest]
        width_W = range(1, percent_LW.shape[1] + 1)
        axes.plot(width_W, percent_LW.mean(axis=0), color=colour, linestyle=style, label=label)
        if percent_LW.shape[1] < widest:
            axes.plot(width_W[-1], percent_LW[:, -1].mean(), color=colour, marker="o", ms=4)
        at_k_L = 100 * recall.at_width(trace.top_k)
        if np.isfinite(at_k_L).all():
            start = trace.num_layers - len(at_k_L)
            beside.plot(range(start, trace.num_layers), at_k_L, color=colour, linestyle=style)
    axes.axvline(trace.top_k, color=FAINT, lw=0.8)
    axes.annotate(f"K = {trace.top_k}", (trace.top_k, 2), (4, 0), textcoords="offset points", color=FAINT)
    axes.set(title="mean over layers", xlabel="experts guessed (width)", ylabel="recall, %", ylim=(0, 101))
    axes.set_xlim(1, widest)
    axes.grid()
    beside.set(title=f"{trace.top_k} guesses, by layer", xlim=(0, trace.num_layers - 1))
    _by_layer(beside, measured)
    figure.legend(loc="outside upper left", ncols=4)
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
    _by_layer(second, measured)
    for name, colour, label in (("within", ORANGE, "in a request"), ("over", GREEN, "over requests")):
        values = found[f"drift_{name}_requests_bits"]
        if np.isfinite(values).all():
            third.plot(values, color=colour, label=label)
            third.plot(found[f"drift_{name}_requests_bits_by_chance"], color=colour, linestyle="--", lw=1)
    third.set(title="drift (dashed: random halves)", ylabel="Jensen-Shannon divergence, bits")
    third.set_ylim(0, 1.3 * third.get_ylim()[1])  # room for the legend
    third.legend(loc="upper left", fontsize=8.5, ncols=2)
    _by_layer(third, measured)
    return figure


ROUTING_PLOTS: Mapping[str, Callable[[Measured], Figure | None]] = {
    "routing-load": load,
    "routing-ranks": ranks,
    "routing-distinct": distinct,
    "routing-tokens": tokens,
    "routing-caches": caches,
    "routing-information": information,
    "routing-transitions": transitions,
    "routing-coactivation": coactivation,
    "routing-prediction": prediction,
    "routing-requests": requests,
}


def _against(axes: Axes, values_L: Floats, chance_L: Floats, colour: str, name: str) -> None:
    """A measure by layer, and what it would be by chance."""
    axes.plot(values_L, color=colour)
    axes.plot(chance_L, color=FAINT, linestyle="--", label=name)
    axes.set_ylim(0, float(np.nanmax([values_L, chance_L])) * 1.1)
    axes.legend(loc="upper right", fontsize=8.5)


def _by_layer(axes: Axes, measured: Measured) -> None:
    axes.set_xlabel("layer")
    axes.grid(axis="y")
    _layer_ticks(axes.xaxis, measured)


def _layer_ticks(axis: Any, measured: Measured) -> None:
    """Ticks at some layers, with their index in the whole model."""
    layers = measured.trace.layers
    step = max(1, -(-len(layers) // 8))
    axis.set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def _shades(number: int) -> list[Any]:
    """Light to dark for small to large."""
    import matplotlib

    return [matplotlib.colormaps[BATCH_COLOURS](0.35 + 0.6 * i / max(1, number - 1)) for i in range(number)]


def _square_root(most: float) -> Any:
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0.0, most, clip=True)


def _matched(counts_EE: Floats) -> tuple[Ints, Ints]:
    """Orders of rows and of columns that bring what goes together near the diagonal.

    Source: correspondence analysis, Hirschfeld 1935: the first axis beside the trivial one.
    """
    row_E, column_E = (np.sqrt(np.maximum(counts_EE.sum(axis=axis), 1e-12)) for axis in (1, 0))
    left_EE, _values, right_EE = np.linalg.svd(counts_EE / np.outer(row_E, column_E))
    axis = min(1, len(left_EE) - 1)
    return np.argsort(left_EE[:, axis] / row_E, kind="stable"), np.argsort(right_EE[axis] / column_E, kind="stable")


def _side_by_side(weight_EE: Floats) -> Ints:
    """An order in which experts with a great weight between them stand together.

    Source: spectral seriation, Atkins et al. 1998: the second eigenvector of the normalised Laplacian.
    """
    scale_E = 1 / np.sqrt(np.maximum(weight_EE.sum(axis=1), 1e-12))
    laplacian_EE = np.diag(weight_EE.sum(axis=1)) - weight_EE
    _values, vectors = np.linalg.eigh(laplacian_EE * np.outer(scale_E, scale_E))
    return np.argsort(vectors[:, min(1, len(vectors) - 1)] * scale_E, kind="stable")
