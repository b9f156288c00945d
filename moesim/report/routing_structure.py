"""Pictures of structure inside the tokens of a routing trace: between layers, between experts, and what it predicts.

A figure is None where the trace has nothing to show in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.report.plots import FAINT, SETUPS, new_figure
from moesim.report.routing import Measured
from moesim.report.routing_plots import against, by_layer, layer_ticks, shades
from moesim.routing.load import Floats, Ints
from moesim.routing.prediction import Recall, gate_recall, popularity_recall, table_recall
from moesim.routing.statistics import HORIZONS
from moesim.routing.structure import coactivation_lift_LEE, transitions_LEE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = SETUPS[:2]


def information(measured: Measured) -> Figure | None:
    """Mutual information between the top-1 experts of two layers, by layer and by horizon, and of shuffled tokens."""
    figure = new_figure(3.1)
    axes = figure.subplots()
    for horizon, colour in zip(HORIZONS, shades(len(HORIZONS))[::-1], strict=True):
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
    layer_ticks(axes.xaxis, measured)
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
    against(beside, information_L, found["coactivation_information_bits_by_chance"], BLUE, "shuffled choices")
    beside.set(title="what one expert of a token tells of another", ylabel="bits per pair")
    by_layer(beside, measured)
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
    by_layer(beside, measured)
    figure.legend(loc="outside upper left", ncols=4)
    return figure


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
