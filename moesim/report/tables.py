"""Set-ups side by side, every number in the unit a person would say it in.

A row is one quantity in one unit, so that the eye can compare along it, unless its values are worlds apart.
The same sections feed the terminal (rich) and the HTML page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from moesim.results import Result

# What people ask for first; every other metric follows, in the order of the results.
HEADLINE = (
    "output_tokens_per_s", "tokens_per_s", "total_tokens_per_s", "goodput_tokens_per_s", "requests_per_s",
    "tpot_s", "tpot_p50_s", "tpot_p99_s", "ttft_s", "ttft_p50_s", "ttft_p99_s", "latency_s", "decode_step_s",
    "prefill_step_s",
)  # fmt: skip
# Parts of an iteration in the order a token meets them, then what is lost, then the rest.
PARTS = (
    "embedding", "attention", "allreduce", "reduce_scatter", "dense", "mlp", "router", "gate", "shared",
    "shared_experts", "dispatch", "expert_copies", "copy", "miss", "misses", "prefetch",
    "experts", "cpu_experts", "combine", "all_gather", "head", "host", "pipeline", "imbalance", "bubble", "wait",
    "queue", "overhead", "launch", "other",
)  # fmt: skip
MEMORY_PARTS = (
    "weights", "other_weights", "attention", "dense", "shared", "shared_experts", "experts", "expert_cache", "head",
    "embedding", "kv_cache", "kv", "activations", "buffers", "other",
)  # fmt: skip
PROVENANCE = ("measured_fraction", "fitted_fraction", "datasheet_fraction", "assumed_fraction")
NONE = "\u2013"
WORDS = {
    **{word: word.upper() for word in ("ttft", "tpot", "e2e", "itl", "kv", "gpu", "cpu", "hbm", "slo", "flop")},
    **{word: word.upper() for word in ("ep", "tp", "dp", "pp", "mla", "mtp", "lru", "lfu", "mfu", "mbu")},
    "allreduce": "all-reduce", "head": "LM head", "nvlink": "NVLink", "pcie": "PCIe",
}  # fmt: skip
DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
BINARY = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
# suffix of a metric's name -> sizes to choose from, largest first; the first suffix that fits wins
UNITS: tuple[tuple[str, tuple[tuple[float, str], ...]], ...] = (
    ("_bytes_per_s", tuple((size, f"{sign}B/s") for size, sign in DECIMAL)),
    ("_flops_per_s", tuple((size, f"{sign}FLOP/s") for size, sign in DECIMAL)),
    ("_per_s", DECIMAL),
    ("_s", SECONDS),
    ("_bytes", BINARY),
    ("_fraction", ((0.01, "%"),)),
    ("_rate", ((0.01, "%"),)),
    ("_ratio", ((1.0, ""),)),
    ("_flops", tuple((size, f"{sign}FLOP") for size, sign in DECIMAL)),
    ("_joules", ((1e6, "MJ"), (1e3, "kJ"), (1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ"))),
    ("_watts", ((1e6, "MW"), (1e3, "kW"), (1.0, "W"))),
    ("_usd", ((1.0, "USD"),)),
)


@dataclass(frozen=True)
class Cell:
    """One number in words; the note is its interval or its share; best marks the winner of the row."""

    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One quantity over the set-ups."""

    label: str
    cells: tuple[Cell, ...]
    is_total: bool = False


@dataclass(frozen=True)
class Section:
    """One table: set-ups are its columns."""

    title: str
    setups: tuple[str, ...]
    rows: tuple[Row, ...]


def label_of(name: str) -> str:
    """Words for a metric or a part.

    >>> label_of("tpot_p99_s"), label_of("output_tokens_per_s"), label_of("kv_cache")
    ('TPOT p99', 'Output tokens/s', 'KV cache')
    """
    stem = name.removeprefix("num_")
    suffix = next((suffix for suffix, _ in UNITS if name.endswith(suffix)), "")
    if suffix not in ("_rate", "_ratio"):
        stem = stem.removesuffix(suffix) or name
    words = [WORDS.get(word, word) for word in stem.split("_") if word]
    text = " ".join(words) + ("/s" if suffix == "_per_s" else "")
    return text[:1].upper() + text[1:]


def unit_of(name: str, values: Iterable[float]) -> tuple[float, str]:
    """The size and sign in which a row of values reads best: near their geometric mean."""
    head, _, _ = name.partition("_per_")
    is_cost = "_per_" in name and not name.endswith("_per_s")  # joules_per_token, s_per_step
    kind = f"_{head}" if is_cost else name
    sizes = next((sizes for suffix, sizes in UNITS if kind.endswith(suffix)), ((1.0, ""),))
    logs = [math.log(abs(value)) for value in values if value and math.isfinite(value)]
    typical = math.exp(sum(logs) / len(logs)) if logs else sizes[-1][0]
    return next(((size, sign) for size, sign in sizes if typical >= size * 0.9995), sizes[-1])


def number(value: float) -> str:
    """Three significant digits, never in powers of ten.

    >>> number(12.345), number(1234.5), number(0.99996), number(0)
    ('12.3', '1,234', '1.00', '0')
    """
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(float(f"{value:.3g}"))
    if size == 0:
        return "0"
    decimals = 0 if size >= 100 else 2 - math.floor(math.log10(size))
    return f"{value:,.{min(decimals, 6)}f}"


def quantity(value: float, unit: tuple[float, str], decimals: int | None = None) -> str:
    """A number in a unit: 12.3 k, 9.81 ms, 45.2 %."""
    size, sign = unit
    text = number(value / size) if decimals is None else f"{value / size:,.{decimals}f}"
    return f"{text} {sign}" if sign else text


def between(interval: tuple[float, float], unit: tuple[float, str]) -> str:
    """An interval in a unit: (10.1 – 14.8 k)."""
    return f"({number(interval[0] / unit[0])} \u2013 {quantity(interval[1], unit)})"


def decimals_of(totals: Iterable[float], unit: tuple[float, str]) -> int:
    """Decimals for parts that stand above their totals: so many that the smallest total shows four digits."""
    sizes = [total / unit[0] for total in totals if total > 0]
    return max(0, min(3, 3 - math.floor(math.log10(min(sizes))))) if sizes else 0


def percent(share: float) -> str:
    """A share, without false precision."""
    return "<1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def ordered(names: Iterable[str], first: Sequence[str]) -> list[str]:
    """Known names in their order, then the others as they come, each once."""
    seen = dict.fromkeys(names)
    return [name for name in first if name in seen] + [name for name in seen if name not in first]


def parts_of(tables: Iterable[Mapping[str, float]], first: Sequence[str] = PARTS) -> list[str]:
    """Parts that are not zero everywhere, in a sensible order."""
    return ordered((part for table in tables for part, value in table.items() if value), first)


def phases_of(results: Sequence[Result]) -> list[str]:
    """Phases in which some set-up spends time, decode first."""
    spent = (phase for result in results for phase, table in result.breakdown_s.items() if any(table.values()))
    return ordered(spent, ("decode", "prefill"))


def main_metric(results: Sequence[Result]) -> str | None:
    """The metric that ranks the set-ups: tokens, else requests, per second; else seconds per token."""
    names = ordered((name for result in results for name in result.metrics), HEADLINE)
    for suffix in ("tokens_per_s", "requests_per_s", "tpot_s"):
        found = [name for name in names if name.endswith(suffix)]
        if found:
            return found[0]
    return None


def is_higher_better(name: str) -> bool | None:
    """Whether more is better, or None where that is not for a table to say."""
    if name.endswith(("tokens_per_s", "requests_per_s")):
        return True
    return False if name.endswith("_s") and name.startswith(("tpot", "ttft", "itl", "latency")) else None


def metric_row(results: Sequence[Result], name: str, label: str = "", higher: bool | None = None) -> Row:
    """One metric over the set-ups, each with its interval; `higher`: whether more is better, where that can be said."""
    values = [result.metrics.get(name) for result in results]
    known = [value for value in values if value is not None and not math.isnan(value)]
    unit = unit_of(name, known)
    sizes = [abs(value) for value in known if value]
    is_wide = bool(sizes) and max(sizes) > 30 * min(sizes)
    best = None if higher is None or len(set(known)) < 2 else (max if higher else min)(known)
    cells = []
    for result, value in zip(results, values, strict=True):
        if value is None:
            cells.append(Cell(NONE))
            continue
        own = unit_of(name, [value]) if is_wide else unit
        interval = result.intervals.get(name)
        note = between(interval, own) if interval else ""
        is_count = name.startswith("num_") and value == int(value)
        cells.append(Cell(quantity(value, own, 0 if is_count else None), note, value == best))
    return Row(label or label_of(name), tuple(cells))


def headline(results: Sequence[Result]) -> Section:
    """Every metric, the ones people ask for first, each with its interval."""
    rows = []
    for name in ordered((name for result in results for name in result.metrics), HEADLINE):
        rows.append(metric_row(results, name, higher=is_higher_better(name)))
        values = [result.metrics.get(name, math.nan) for result in results]
        best = next((value for value, cell in zip(values, rows[-1].cells, strict=True) if cell.best), 0.0)
        if name == main_metric(results) and best > 0:
            rows.append(Row("  of the best", tuple(Cell(f"{number(value / best)} \u00d7") for value in values)))
    return Section("Headline", tuple(result.name for result in results), tuple(rows))


def breakdown(results: Sequence[Result], phase: str) -> Section:
    """Where the time of one iteration goes: exposed seconds of each part, and their sum."""
    tables = [result.breakdown_s.get(phase, {}) for result in results]
    totals = [math.fsum(table.values()) for table in tables]
    unit = unit_of("iteration_s", [total for total in totals if total])
    decimals = decimals_of(totals, unit)
    rows = []
    for part in parts_of(tables):
        cells = [
            Cell(quantity(table[part], unit, decimals), percent(table[part] / total) if total else "")
            if part in table
            else Cell(NONE)
            for table, total in zip(tables, totals, strict=True)
        ]
        rows.append(Row(label_of(part), tuple(cells)))
    sums = [Cell(quantity(total, unit, decimals), "100 %") if total else Cell(NONE) for total in totals]
    rows.append(Row("Iteration", tuple(sums), is_total=True))
    return Section(f"Where a {phase} iteration goes", tuple(result.name for result in results), tuple(rows))


def memory(results: Sequence[Result]) -> Section:
    """What fills the fullest device, against what it has."""
    tables = [{k: v for k, v in result.memory_bytes.items() if k != "capacity"} for result in results]
    capacities = [result.memory_bytes.get("capacity", 0.0) for result in results]
    unit = (2.0**30, "GiB")
    decimals = min(1, decimals_of([math.fsum(table.values()) for table in tables], unit))

    def cell(value: float | None, capacity: float) -> Cell:
        if value is None:
            return Cell(NONE)
        return Cell(quantity(value, unit, decimals), percent(value / capacity) if capacity else "")

    pairs = list(zip(tables, capacities, strict=True))
    rows = [
        Row(label_of(part), tuple(cell(table.get(part), capacity) for table, capacity in pairs))
        for part in parts_of(tables, MEMORY_PARTS)
    ]
    used = [cell(math.fsum(table.values()) if table else None, capacity) for table, capacity in pairs]
    rows.append(Row("Used", tuple(used), is_total=True))
    rows.append(Row("Capacity", tuple(cell(capacity or None, 0.0) for capacity in capacities)))
    return Section("Memory of the fullest device", tuple(result.name for result in results), tuple(rows))


def provenance(results: Sequence[Result]) -> Section:
    """Which share of the busy time comes from which kind of number."""
    names = ordered((name for result in results for name in result.provenance), PROVENANCE)
    rows = [
        Row(
            label_of(name),
            tuple(
                Cell(percent(result.provenance[name])) if name in result.provenance else Cell(NONE)
                for result in results
            ),
        )
        for name in names
    ]
    return Section("Where the numbers come from", tuple(result.name for result in results), tuple(rows))


def sections(results: Sequence[Result]) -> list[Section]:
    """All tables that have something to say."""
    if not results:
        raise ValueError("report: there are no results to show; run at least one set-up")
    found = [headline(results)] if any(result.metrics for result in results) else []
    found += [breakdown(results, phase) for phase in phases_of(results)]
    if any(result.memory_bytes for result in results):
        found.append(memory(results))
    if any(result.provenance for result in results):
        found.append(provenance(results))
    return found


def warnings_of(results: Sequence[Result]) -> dict[str, list[str]]:
    """Warning -> names of the set-ups that it is about."""
    about: dict[str, list[str]] = {}
    for result in results:
        for warning in dict.fromkeys(result.warnings):
            about.setdefault(warning, []).append(result.name)
    return about


def result_tables(
    results: Sequence[Result], width: int = 80, shown: Sequence[Section] | None = None, column: int = 18
) -> list[Table]:
    """The results as tables for a terminal of `width` columns; set-ups that do not fit go to a next table.

    shown: the tables, instead of all `sections`; column: the room that one set-up needs.
    """
    tables = []
    most = max(1, (width - 24) // column)
    for section in sections(results) if shown is None else shown:
        num = len(section.setups)
        size = -(-num // max(1, -(-num // most)))
        tables += [terminal_table(section, slice(start, start + size), width) for start in range(0, num, size)]
    about = warnings_of(results)
    if about:
        table = Table(title="Warnings", title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(style="yellow", no_wrap=True)
        table.add_column(overflow="fold")
        for warning, names in about.items():
            whom = "all" if len(names) == len(results) > 1 else ", ".join(names)
            table.add_row("!", Text(f"{whom}: {warning}"))
        tables.append(table)
    return tables


def terminal_table(section: Section, chosen: slice, width: int) -> Table:
    """Some columns of a section as a table for a terminal of `width` columns."""
    setups = section.setups[chosen]
    is_wide = (width - 24) // len(setups) >= 28
    notes = [cell.note for row in section.rows for cell in row.cells]
    is_share = all(not note or note.endswith("%") for note in notes)
    table = Table(
        title=section.title, title_justify="left", title_style="bold", box=box.HORIZONTALS, show_edge=False,
        padding=(0, 1), min_width=44,
    )  # fmt: skip
    table.add_column("", min_width=16, overflow="fold")
    for name in setups:
        table.add_column(Text(name, style="bold"), justify="right", overflow="fold")
    for index, row in enumerate(section.rows):
        texts = []
        for cell in row.cells[chosen]:
            text = Text(cell.text, style="bold green" if cell.best else "")
            if is_share and any(notes):
                text.append(f"{cell.note:>7}", style="dim")
            elif cell.note:
                text.append((" " if is_wide else "\n") + cell.note, style="not bold dim")
            texts.append(text)
        is_last_part = index + 1 < len(section.rows) and section.rows[index + 1].is_total
        style = "bold" if row.is_total else ""
        table.add_row(Text(row.label), *texts, style=style, end_section=is_last_part)
    return table
