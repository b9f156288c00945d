"""One self-contained page that answers the question first and shows the evidence below it.

No scripts, no requests, no dates: the page opens anywhere, and the same results give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from moesim.report import replace_file
from moesim.report.plots import draw, has_load
from moesim.report.tables import (
    Section,
    between,
    label_of,
    main_metric,
    number,
    percent,
    phases_of,
    quantity,
    sections,
    unit_of,
    warnings_of,
)  # fmt: skip
from moesim.results import Result

# What a reader is waiting for when this part is large.
MEANING = {
    "attention": "attention",
    "experts": "computing the experts",
    "dispatch": "sending tokens to their experts",
    "combine": "bringing the experts' outputs back",
    "imbalance": "waiting for the most loaded rank",
    "expert_load": "copying experts into device memory",
    "expert_loads": "copying experts into device memory",
    "copy": "copying experts into device memory",
    "miss": "copying experts into device memory",
    "misses": "copying experts into device memory",
    "cpu_experts": "computing experts on the CPU",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "shared": "the shared experts",
    "shared_experts": "the shared experts",
    "dense": "dense layers",
    "bubble": "pipeline bubbles",
}


def write_html(results: Sequence[Result], path: str | Path) -> None:
    """Write the report of one or several set-ups to `path`, in one step."""
    replace_file(path, page(results).encode())


def page(results: Sequence[Result]) -> str:
    """The whole page as text."""
    tables = {section.title: section for section in sections(results)}
    body = []
    if "Headline" in tables:
        body.append(page_section("Headline", "", html_table(tables["Headline"])))
    metric = main_metric(results)
    if metric:
        says = "Whiskers: the interval that the believed efficiencies leave open." if _has(results, metric) else ""
        body.append(picture(label_of(metric), says, draw("throughput", results)))
    times = "".join(
        details(section.title, html_table(section)) for title, section in tables.items() if title.startswith("Where a")
    )
    says = "Exposed time, mean over ranks and iterations; what hides behind other work is not in it."
    body.append(picture("Where the time of an iteration goes", says, draw("iteration", results), times))
    says = "A rise that stays is a growing context or a drifting load; a spike is a miss, a queue or a failure."
    body.append(picture("Decode iterations over time", says, draw("steps", results)))
    alone = [result.name for result in results if not has_load(result)]
    says = "Tokens x experts computed on each rank: the reddest rank of a layer sets its pace."
    says += f" Without a load to compare: {', '.join(alone)}." if alone else ""
    body.append(picture("Load of the ranks", says, draw("load", results)))
    title = "Memory of the fullest device"
    body.append(
        picture(title, "", draw("memory", results), details("The numbers", html_table(tables[title])))
        if title in tables
        else ""
    )
    says = "Share of the busy time that rests on measured, fitted, datasheet and assumed numbers."
    body.append(picture("Where the numbers come from", says, draw("provenance", results)))
    tail, footer = page_tail(results)
    body += tail
    return Template(page_file("page.html")).substitute(
        title=escape(" · ".join(result.name for result in results)),
        css=page_file("page.css"),
        answer=escape(answer(results)),
        body="\n".join(part for part in body if part),
        footer=footer,
    )


def answer(results: Sequence[Result]) -> str:
    """The result in plain words: the fastest set-up, by what factor, how sure that is, and what bounds it."""
    metric = main_metric(results)
    known = [result for result in results if metric and result.metrics.get(metric, 0.0) > 0]
    if metric is None or not known:
        names = listed([result.name for result in results])
        return f"{names}: no throughput was reported, so the set-ups are not ranked."
    is_rate = metric.endswith("_per_s")
    known.sort(key=lambda result: result.metrics[metric], reverse=is_rate)
    best, others = known[0], known[1:]
    unit = unit_of(metric, [best.metrics[metric]])
    interval = best.intervals.get(metric)
    amount = quantity(best.metrics[metric], unit).replace(" s", " seconds")
    what = f"{amount} {label_of(metric)[:1].lower()}{label_of(metric)[1:]}" if is_rate else f"{amount} per token"
    what += f" {between(interval, unit)}" if interval else ""
    if not others:
        said = [f"{best.name} reaches {what}."]
    else:
        shown = others if len(others) <= 3 else [others[0], others[-1]]
        factors = [f"{_factor(best, other, metric)} times {other.name}" for other in shown]
        said = [f"{best.name} is the fastest of {len(known)} set-ups with {what}: {listed(factors)}."]
        unsure = [other.name for other in others if _overlap(best, other, metric)]
        if unsure:
            verb = "overlaps" if len(unsure) == 1 else "overlap"
            said.append(f"The interval of {listed(unsure)} {verb} with it, so that this order is not certain.")
    said += _bound(best, others)
    measured = best.provenance.get("measured_fraction")
    if measured is not None:
        assumed = best.provenance.get("assumed_fraction", 0.0)
        rest = f" and {percent(assumed)} on assumed ones" if assumed else ""
        said.append(f"{percent(measured)} of the busy time of {best.name} rests on measured numbers{rest}.")
    return " ".join(said)


def page_tail(results: Sequence[Result]) -> tuple[list[str], str]:
    """What stands at the end of every page: sections of warnings and scenarios, and the footer."""
    sections, about = [], warnings_of(results)
    if about:
        lines = [f"<li><b>{escape(', '.join(names))}</b>: {escape(text)}</li>" for text, names in about.items()]
        sections.append(page_section("Warnings", "", f'<ul class="warnings">{"".join(lines)}</ul>'))
    scenarios = [details(f"Scenario of {r.name}", f"<pre>{escape(_plain(r.scenario))}</pre>") for r in results]
    sections.append(page_section("Scenarios", "Enough to run each set-up again.", "".join(scenarios)))
    return sections, _footer(results)


def _bound(best: Result, others: Sequence[Result]) -> list[str]:
    """What the fastest set-up waits for, and what the next one spends more on."""
    phase = next(iter(phases_of([best])), None)
    table = best.breakdown_s.get(phase, {}) if phase else {}
    total = math.fsum(table.values())
    if not total:
        return []
    largest = sorted(table, key=lambda part: (-table[part], part))[:2]
    shares = [f"{_meaning(part)} ({percent(table[part] / total)})" for part in largest if table[part]]
    duration = quantity(total, unit_of("iteration_s", [total]))
    said = [f"Its {phase} iteration takes {duration}, bound first by {listed(shares)}."]
    other = others[0].breakdown_s.get(phase or "", {}) if others else {}
    more = {part: value - table.get(part, 0.0) for part, value in other.items()}
    if more:
        part = max(more, key=lambda part: (more[part], part))
        if more[part] > 0.02 * total:
            extra = quantity(more[part], unit_of("iteration_s", [more[part]]))
            said.append(f"{others[0].name} spends {extra} more of each iteration on {_meaning(part)}.")
    return said


def _meaning(part: str) -> str:
    return MEANING.get(part, label_of(part).lower() if "kv" not in part else label_of(part))


def _factor(best: Result, other: Result, metric: str) -> str:
    ratio = best.metrics[metric] / other.metrics[metric]
    return number(ratio if metric.endswith("_per_s") else 1 / ratio)


def _overlap(one: Result, other: Result, metric: str) -> bool:
    if metric not in one.intervals or metric not in other.intervals:
        return False
    (low, high), (other_low, other_high) = one.intervals[metric], other.intervals[metric]
    return low <= other_high and other_low <= high


def _has(results: Sequence[Result], metric: str) -> bool:
    return any(metric in result.intervals for result in results)


def listed(names: Sequence[str]) -> str:
    """Names in a row: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def page_section(title: str, says: str, content: str) -> str:
    """A titled part of the page; `content` is HTML, the others are plain text."""
    words = f'<p class="says">{escape(says)}</p>\n' if says else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{words}{content}\n</section>"


def picture(title: str, says: str, svg: str, more: str = "") -> str:
    """A section around one picture; empty where there is none."""
    if not svg:
        return ""
    named = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return page_section(title, says, f"<figure>{named}</figure>{more}")


def details(title: str, content: str) -> str:
    """HTML that is folded away under a title."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>\n"


def html_table(section: Section) -> str:
    """A section as an HTML table."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in section.setups)
    lines = []
    for row in section.rows:
        cells = []
        for cell in row.cells:
            kind = "note share" if cell.note.endswith("%") else "note"
            note = f'<span class="{kind}">{escape(cell.note)}</span>' if cell.note else ""
            best = ' class="best"' if cell.best else ""
            cells.append(f"<td{best}>{escape(cell.text)}{note}</td>")
        kind = ' class="total"' if row.is_total else ""
        lines.append(f'<tr{kind}><th scope="row">{escape(row.label)}</th>{"".join(cells)}</tr>')
    rows = "\n".join(lines)
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _footer(results: Sequence[Result]) -> str:
    about: dict[str, list[str]] = {}
    for result in results:
        made = f"moesim {result.version}, engine {result.engine}, seed {result.seed}"
        about.setdefault(made, []).append(result.name)
    if len(about) == 1:
        return f"<p>{escape(next(iter(about)))}</p>"
    return "".join(f"<p>{escape(', '.join(names))}: {escape(made)}</p>" for made, names in about.items())


def _plain(scenario: Mapping[str, Any]) -> str:
    def plain(value: Any) -> Any:
        return dict(value) if isinstance(value, Mapping) else str(value)

    return json.dumps(dict(scenario), indent=2, ensure_ascii=False, default=plain)


def page_file(name: str) -> str:
    """Text of a file beside this module: the page or its style sheet."""
    return files("moesim.report").joinpath(name).read_text(encoding="utf-8")
