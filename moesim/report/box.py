"""What fits a box, as tables and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.boxes import Fit
from moesim.files.boxes import UPGRADES
from moesim.report import write_figure
from moesim.report.plots import SETUPS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


def box_tables(fits: Sequence[Fit]) -> list[Table]:
    """Models that run, with the best policies and what would help; and those that do not, with the reason."""
    from rich.table import Table

    runs = Table(title="What fits", title_justify="left", box=None, pad_edge=False)
    columns = ("model", "tokens/s", "range", "policies", "next best", "TTFT", "hits", "on device", "helps most")
    for column, name in enumerate(columns):
        runs.add_column(name, justify="left" if column in (0, 3, 4, 8) else "right", no_wrap=column in (0, 1, 2))
    for fit in fits:
        if fit.reason:
            continue
        second = list(fit.rates.items())[1:2]
        beside = f"{second[0][0]} ({second[0][1] / fit.rates[fit.best]:.2f} \u00d7)" if second else "\u2013"
        upgrade = max(fit.gains, key=lambda name: fit.gains[name])
        helps = f"{upgrade} ({fit.gains[upgrade]:.2f} \u00d7)" if fit.gains[upgrade] > 1.02 else "none of them"
        runs.add_row(
            fit.model, _number(fit.rates[fit.best]), f"{_number(fit.low)} \u2013 {_number(fit.high)}", fit.best, beside,
            _seconds(fit.ttft_s), f"{100 * fit.hit_rate:.0f} %", f"{100 * fit.on_device:.0f} %", helps,
        )  # fmt: skip
    tables = [runs]
    lacking = [fit for fit in fits if fit.reason]
    if lacking:
        table = Table(title="What does not", title_justify="left", box=None, pad_edge=False)
        table.add_column("model", no_wrap=True)
        table.add_column("because")
        for fit in lacking:
            table.add_row(fit.model, fit.reason)
        tables.append(table)
    return tables


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms"


def box_figure(fits: Sequence[Fit]) -> Figure:
    """Tokens a second of every system (the best one filled), and what each upgrade brings."""
    fits = [fit for fit in fits if not fit.reason]
    figure = new_figure(1.4 + 0.36 * len(fits))
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [3, 2]})
    rows = range(len(fits))
    for row, fit in zip(rows, fits, strict=True):
        others = list(fit.rates.values())[1:]
        left.plot([fit.low, fit.high], [row, row], color=SETUPS[0], linewidth=4, alpha=0.3, solid_capstyle="butt")
        left.plot(others, [row] * len(others), "|", color="#8a8f98", markersize=9)
        left.plot([fit.rates[fit.best]], [row], "o", color=SETUPS[0], markersize=7)
        left.annotate(fit.best, (fit.rates[fit.best], row), xytext=(9, 0), textcoords="offset points", va="center",
                      fontsize=8)  # fmt: skip
    left.set_yticks(list(rows), [fit.model for fit in fits])
    left.set_xscale("log")
    left.set_xlabel("tokens/s (dot: best policies, band: range, bars: other policies)")
    fastest = max(max(fit.high, fit.rates[fit.best]) for fit in fits)
    left.set_xlim(right=6 * fastest)
    height = 0.8 / len(UPGRADES)
    for place, (upgrade, words) in enumerate(UPGRADES.items()):
        ends = [fit.gains[upgrade] for fit in fits]
        at = [row + (place - 1) * height for row in rows]
        right.barh(at, [end - 1 for end in ends], left=1.0, height=height, color=SETUPS[place], label=words)
    right.set_xlabel("factor on tokens/s")
    right.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=8, frameon=False)
    left.invert_yaxis()
    return figure


def write_box_figure(fits: Sequence[Fit], path: str | Path) -> None:
    """The picture as a file of the kind that its name ends in (.png, .svg, .pdf)."""
    write_figure(box_figure(fits), path)
