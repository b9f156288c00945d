"""One self-contained page about serving runs: what users of the service see, when, at what cost, and why."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from string import Template

from moesim.report import replace_file
from moesim.report.html import MEANING, details, html_table, listed, page_file, page_section, page_tail, picture
from moesim.report.plots import draw, svg
from moesim.report.serving_plots import SERVING_PLOTS
from moesim.report.serving_tables import (
    fullness_section,
    latency_section,
    search_section,
    serving_sections,
    throughput_section,
)  # fmt: skip
from moesim.report.tables import label_of, number, percent, quantity, unit_of
from moesim.serving.results import PHASE, ServingResult

# picture -> title, how to read it
PICTURES = {
    "latency": (
        "Latencies",
        "How many requests are within a latency; dashed: the promise. A curve far to the right of the others at the "
        "top is a tail: queueing, long prompts of others, or preemption.",
    ),
    "timeline": (
        "Over time",
        "Means over windows. A queue that keeps growing is more load than the service can take; a full cache stops "
        "it from taking in more.",
    ),
    "ttft_by_prompt": (
        "Time to first token by length of the prompt",
        "One dot is one request. A lower edge that rises is the computation of the prompt; what stands above it "
        "waited, and dots below it had their prompt cached.",
    ),
    "search": (
        "Search for the maximum rate",
        "Each dot is a whole run of the same requests, sent faster or slower; dashed: the share that must keep the "
        "promise.",
    ),
}


def write_serving_page(results: Sequence[ServingResult], path: str | Path) -> None:
    """Write the report of one or several set-ups to `path`, in one step."""
    replace_file(path, serving_page(results).encode())


def serving_page(results: Sequence[ServingResult]) -> str:
    """The whole page as text.

    Raises:
        ValueError: there are no results.
    """
    tables = {section.title: section for section in serving_sections(results)}
    latency, throughput, fullness = latency_section(results), throughput_section(results), fullness_section(results)
    folded = {
        "latency": details("The numbers", html_table(latency)),
        "timeline": details(fullness.title, html_table(fullness)),
        "search": "".join(details(s.title, html_table(s)) for s in map(search_section, _searched(results))),
    }
    body = [page_section(throughput.title, "", html_table(throughput))]
    for name, (title, says) in PICTURES.items():
        image = svg(f"serving-{name}", partial(SERVING_PLOTS[name], results))
        body.append(picture(title, says, image, folded.get(name, "")))
    says = "Exposed time of a mean iteration, prompts and decoding mixed, mean over ranks."
    parts = next((section for title, section in tables.items() if title.startswith("Where a")), None)
    numbers = details("The numbers", html_table(parts)) if parts else ""
    body.append(picture("Where the time of an iteration goes", says, draw("iteration", results), numbers))
    body.append(picture("Memory of the fullest device", "", draw("memory", results)))
    says = "Share of the busy time that rests on measured, fitted, datasheet and assumed numbers."
    body.append(picture("Where the numbers come from", says, draw("provenance", results)))
    tail, footer = page_tail(results)
    return Template(page_file("page.html")).substitute(
        title=escape(" · ".join(result.name for result in results)),
        css=page_file("page.css"),
        answer=escape(serving_answer(results)),
        body="\n".join(part for part in [*body, *tail] if part),
        footer=footer,
    )


def serving_answer(results: Sequence[ServingResult]) -> str:
    """The runs in plain words: what users see, which set-up is best by what, cost, and what an iteration waits for."""
    said = [_stopped(result) for result in results if result.is_partial]
    metric, words = next(
        ((name, words) for name, words in _RANKED.items() if all(name in result.metrics for result in results)),
        ("", ""),
    )
    best = results[0]
    if len(results) > 1 and metric:
        is_less = metric.endswith("_s") and not metric.endswith("_per_s")
        order = sorted(results, key=lambda result: result.metrics[metric] * (1 if is_less else -1))
        best, second = order[0], order[1]
        values = [result.metrics[metric] for result in order]
        unit = unit_of(metric, values[:1])
        if values[0] == values[1]:
            said.append(f"{best.name} and {second.name} have the same {words}: {quantity(values[0], unit)}.")
        else:
            rest = [f"{quantity(v, unit_of(metric, [v]))} of {r.name}" for r, v in zip(order, values, strict=True)][1:]
            said.append(f"{best.name} has the best {words}: {quantity(values[0], unit)}, against {listed(rest)}.")
    said += [f"{result.name}: {result.search.says}" for result in results if result.search]
    said += _seen(best)
    table = best.breakdown_s.get(PHASE, {})
    total = sum(table.values())
    if total:
        largest = sorted(table, key=lambda part: (-table[part], part))[:2]
        shares = [f"{MEANING.get(part, label_of(part).lower())} ({percent(table[part] / total)})" for part in largest]
        said.append(f"An iteration takes {quantity(total, unit_of('x_s', [total]))}, first for {listed(shares)}.")
    return " ".join(said)


_RANKED = {
    "max_requests_per_s": "maximum rate",
    "slo_attainment_fraction": "share of requests within the promise",
    "e2e_mean_s": "mean time from arrival to last token",
}


def _seen(result: ServingResult) -> list[str]:
    """What users of one set-up see, what it puts out, and what that costs."""
    metrics = result.metrics

    def typical(name: str) -> str:
        middle, tail = (quantity(s, unit_of("x_s", [s])) for s in (metrics[f"{name}_p50_s"], metrics[f"{name}_p99_s"]))
        return f"{label_of(name)} {middle} (p99 {tail})"

    said = []
    seen = [typical(name) for name in ("ttft", "tpot", "e2e") if f"{name}_p50_s" in metrics]
    if seen and "requests_per_s" in metrics:
        rate, tokens = metrics["requests_per_s"], metrics["output_tokens_per_s"]
        answered = f"{number(rate)} requests/s with {quantity(tokens, unit_of('x_per_s', [tokens]))} output tokens/s"
        said.append(f"{result.name} answers {answered}; in the median {listed(seen)}.")
    if "slo_attainment_fraction" in metrics:
        bounds = [f"{label_of(n)} ≤ {quantity(s, unit_of('x_s', [s]))}" for n, s in result.promises.items()]
        said.append(f"{100 * metrics['slo_attainment_fraction']:.3g} % of the requests keep {listed(bounds)}.")
    if "usd_per_million_output_tokens" in metrics:
        said.append(f"A million output tokens cost {number(metrics['usd_per_million_output_tokens'])} USD.")
    return said


def _stopped(result: ServingResult) -> str:
    return f"PARTIAL: {result.name} was stopped before its end, and this is of what was done by then."


def _searched(results: Sequence[ServingResult]) -> list[ServingResult]:
    return [result for result in results if result.search]
