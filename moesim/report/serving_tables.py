"""Serving runs side by side: latencies, throughput and cost, how full they were, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.report.tables import (
    NONE,
    Cell,
    Row,
    Section,
    breakdown,
    label_of,
    memory,
    metric_row,
    number,
    phases_of,
    provenance,
    quantity,
    unit_of,
)  # fmt: skip
from moesim.serving.metrics import LATENCIES
from moesim.serving.results import ServingResult

COLUMNS = ("mean", "p50", "p90", "p99")
THROUGHPUT = {
    "max_requests_per_s": ("Most requests/s within the promise", True),
    "requests_per_s": ("Requests/s", True),
    "goodput_requests_per_s": ("Requests/s within the promise", True),
    "slo_attainment_fraction": ("Requests within the promise", True),
    "output_tokens_per_s": ("Output tokens/s", True),
    "output_tokens_per_s_per_device": ("  per device", True),
    "output_tokens_per_s_per_node": ("  per node", True),
    "input_tokens_per_s": ("Input tokens/s", True),
    "total_tokens_per_s": ("All tokens/s", True),
    "total_tokens_per_s_per_device": ("  per device", True),
    "usd_per_million_output_tokens": ("Cost of 1 M output tokens", False),
    "usd_per_million_tokens": ("Cost of 1 M tokens", False),
    "joules_per_million_output_tokens": ("Energy of 1 M output tokens", False),
    "joules_per_million_tokens": ("Energy of 1 M tokens", False),
}
"""Metric -> its words, and whether more is better."""
FULLNESS = {
    "utilization_fraction": "Time in iterations",
    "kv_mean_fraction": "KV cache, mean",
    "kv_peak_fraction": "KV cache, peak",
    "num_running_mean": "Running requests, mean",
    "num_waiting_mean": "Waiting requests, mean",
    "num_waiting_peak": "Waiting requests, peak",
    "imbalance_mean_ratio": "Busiest rank over mean",
    "cached_tokens_fraction": "Prompt tokens from cache",
    "num_preemptions": "Preemptions",
    "num_requests": "Requests",
    "num_unfinished": "  not answered",
    "num_dropped": "  refused",
    "littles_law_ratio": "Little's law, both sides",
    "duration_s": "Simulated time",
    "num_iterations": "Iterations",
}


def latency_section(results: Sequence[ServingResult]) -> Section:
    """Latencies: of one set-up a row for each and a column for mean and quantiles; of several a row for all of that."""
    present = [name for name in LATENCIES if any(f"{name}_mean_s" in result.metrics for result in results)]
    if len(results) > 1:
        rows = [
            metric_row(
                results, f"{name}_{column}_s", f"{label_of(name) if column == COLUMNS[0] else '  '} {column}", False
            )
            for name in present
            for column in COLUMNS
        ]
        return Section("Latency", tuple(result.name for result in results), tuple(rows))
    result, rows = results[0], []
    for name in present:
        values = [result.metrics[f"{name}_{column}_s"] for column in COLUMNS]
        unit, cells = unit_of("x_s", values), []
        for column, value in zip(COLUMNS, values, strict=True):
            low_high = result.intervals.get(f"{name}_{column}_s")
            note = f"{number(low_high[0] / unit[0])}\u2013{number(low_high[1] / unit[0])}" if low_high else ""
            cells.append(Cell(quantity(value, unit), note))
        rows.append(Row(label_of(name), tuple(cells)))
    return Section(f"Latency of {result.name}", COLUMNS, tuple(rows))


def throughput_section(results: Sequence[ServingResult]) -> Section:
    """Requests, tokens, promises kept, USD and joules."""
    known = {name for result in results for name in result.metrics}
    rows = [metric_row(results, name, *said) for name, said in THROUGHPUT.items() if name in known]
    return Section("Throughput and cost", tuple(result.name for result in results), tuple(rows))


def fullness_section(results: Sequence[ServingResult]) -> Section:
    """Use, KV cache, queues, imbalance, and what became of the requests."""
    known = {name for result in results for name in result.metrics if result.metrics[name] or "num_re" in name}
    rows = [metric_row(results, name, label) for name, label in FULLNESS.items() if name in known]
    return Section("How full it was", tuple(result.name for result in results), tuple(rows))


def search_section(result: ServingResult) -> Section:
    """Every rate that was tried, in order of the rate."""
    assert result.search is not None
    rows = []
    for item in sorted(result.search.tried, key=lambda item: item.rate_per_s):
        kept = NONE if item.attainment != item.attainment else f"{100 * item.attainment:.3g} %"
        mark = "yes" if item.attainment >= result.search.target else "no"
        is_best = item.rate_per_s == result.search.rate_per_s
        cells = Cell(kept, best=is_best), Cell(mark, best=is_best)
        rows.append(Row(f"{item.rate_per_s:.4g} requests/s", cells))
    return Section(
        f"Rates tried for {result.name}",
        ("within the promise", f"{100 * result.search.target:g} % or more"),
        tuple(rows),
    )


def serving_sections(results: Sequence[ServingResult]) -> list[Section]:
    """All tables that have something to say.

    Raises:
        ValueError: there are no results.
    """
    if not results:
        raise ValueError("report: there are no results to show; run at least one set-up")
    found = [latency_section(results), throughput_section(results), fullness_section(results)]
    found += [breakdown(results, phase) for phase in phases_of(results)]
    found += [search_section(result) for result in results if result.search]
    if any(result.memory_bytes for result in results):
        found.append(memory(results))
    if any(result.provenance for result in results):
        found.append(provenance(results))
    return [section for section in found if section.rows]
