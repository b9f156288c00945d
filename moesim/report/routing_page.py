"""One self-contained page about a routing trace: what it is like in a few sentences, pictures, and all numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np

from moesim.report import replace_file, routing_plots, routing_structure
from moesim.report.html import details, html_table, listed, page_file, page_section, picture
from moesim.report.plots import svg
from moesim.report.routing import Measured, notes, routing_sections, title_of
from moesim.report.tables import number
from moesim.routing.statistics import cache_sizes
from moesim.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# picture -> title, how to read it, headings of the tables folded under it
PARTS: dict[Callable[[Measured], Figure | None], tuple[str, str, tuple[str, ...]]] = {
    routing_plots.load: (
        "Load of the experts",
        "Red experts get more tokens than the mean of their layer. A layer waits for its busiest expert.",
        ("Load balance",),
    ),
    routing_plots.ranks: (
        "Load of the ranks",
        "Experts in order of their number, E / EP on each rank. Small batches are less even than the whole trace.",
        (),
    ),
    routing_plots.distinct: (
        "Distinct experts in a batch",
        "How many experts' weights one decode step reads. Below the dashed line, tokens of one step agree.",
        ("Distinct experts in a batch",),
    ),
    routing_plots.tokens: (
        "From token to token",
        "What is above the dashed line is memory: of the token before, or of the token itself.",
        ("From token to token",),
    ),
    routing_plots.caches: (
        "Expert cache: misses by size",
        "Mean over layers and their range. No cache of the same size can miss less than Belady's MIN, which knows the "
        "future. A step asks for its distinct experts together, and they stay until the next: with room for K, a cache "
        "just holds the last token's experts, whoever manages it.",
        ("Expert cache, hit ratio",),
    ),
    routing_structure.information: (
        "From layer to layer",
        "Mutual information of the top-1 experts of two layers. The dashed line is what too few tokens feign.",
        ("Between layers, top-1 experts",),
    ),
    routing_structure.transitions: (
        "Where the tokens of an expert go next",
        "The layer pair with the most information. Experts that lead to each other stand near the diagonal; even "
        "columns, as on the right, would mean that a layer says nothing about the next.",
        (),
    ),
    routing_structure.coactivation: (
        "Which experts are chosen together",
        "Pairs of experts of one token in the layer with the most structure; those often chosen together stand "
        "together. Grey: no such pair can be.",
        ("Within a token",),
    ),
    routing_structure.prediction: (
        "Prediction of later layers",
        "Share of a layer's experts among the guesses made layers ahead. Gate: the later layer's router on the earlier "
        "input; table: learnt on every second request, judged on the others.",
        ("Prediction of later layers",),
    ),
    routing_plots.requests: (
        "Topics and drift",
        "Requests that use the same experts, and how the use changes inside a request and from early to late ones.",
        ("Topics and drift",),
    ),
}


def write_routing_page(measured: Measured, path: str | Path) -> None:
    """Write the page to `path`, in one step."""
    replace_file(path, routing_page(measured).encode())


def routing_page(measured: Measured) -> str:
    """The whole page as text."""
    tables = {section.title: section for section in routing_sections(measured)}
    body = []
    for figure_of, (title, says, headings) in PARTS.items():
        image = svg(f"routing-{figure_of.__name__}", partial(figure_of, measured))
        numbers = "".join(html_table(tables[heading]) for heading in headings if heading in tables)
        body.append(
            picture(
                title, says, image, details("The numbers: mean over layers, least and most", numbers) if numbers else ""
            )
        )
    said = notes(measured)
    if said:
        lines = "".join(f"<li>{escape(note)}</li>" for note in said)
        body.append(page_section("Notes", "", f'<ul class="warnings">{lines}</ul>'))
    provenance = json.dumps(dict(measured.trace.provenance), indent=2, ensure_ascii=False)
    body.append(
        page_section("The trace", title_of(measured.trace), details("Provenance", f"<pre>{escape(provenance)}</pre>"))
    )
    return Template(page_file("page.html")).substitute(
        title=escape(f"Routing of {measured.trace.name}"),
        css=page_file("page.css"),
        answer=escape(routing_answer(measured)),
        body="\n".join(part for part in body if part),
        footer=f"<p>moesim {__version__}, trace of {escape(measured.trace.model)}</p>",
    )


def routing_answer(measured: Measured) -> str:
    """The trace in plain words: balance, batches, caches, prediction, topics."""
    trace = measured.trace
    mean = {name: float(np.mean(values)) for name, values in measured.measures.items() if len(values)}
    said = [f"The busiest expert of a layer does {number(mean['load_skew_ratio'])} times the mean work"]
    said[0] += "." if trace.origin == "trained" else f" (router {trace.origin}, not trained)."
    filled = [size for size in measured.batches if np.isfinite(mean[f"num_distinct_experts_batch_{size}"]) and size > 1]
    if filled:
        touched = [f"{number(mean[f'num_distinct_experts_batch_{size}'])} at batch {size}" for size in filled]
        said.append(f"A decode step touches {listed(touched)} of {trace.num_experts} experts.")
    if np.isfinite(mean["set_overlap_fraction"]):
        overlap, chance = mean["set_overlap_fraction"], mean["set_overlap_fraction_by_chance"]
        said.append(
            f"A token keeps {_percent(overlap)} of the previous token's experts (by chance {_percent(chance)})."
        )
    size = cache_sizes(trace)[-1]
    lru, floor = mean[f"lru_hit_ratio_{size}_experts"], mean[f"belady_hit_ratio_{size}_experts"]
    at_hand = f"With {size} experts of each layer at hand, requests in turn,"
    said.append(f"{at_hand} LRU hits {_percent(lru)}; the best possible is {_percent(floor)}.")
    known = [way for way in ("prediction", "table") if np.isfinite(mean.get(f"{way}_recall_fraction", np.nan))]
    if known:
        words = {"prediction": "an earlier run of its gate", "table": "a table of transitions"}
        ways = [f"{words[way]} finds {_percent(mean[f'{way}_recall_fraction'])}" for way in known]
        popular = mean[f"{known[0]}_recall_fraction_by_popularity"]
        said.append(
            f"Of the next layer's experts, {listed(ways)} with {trace.top_k} guesses (popularity {_percent(popular)})."
        )
    return " ".join(said)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
