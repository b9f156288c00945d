"""What a serving run is judged by: latencies, rates, the SLO, cost, and how full it was.

All requests count, unless a window leaves out the start and the end of a run (see `Window`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.fleet import Slo
from moesim.service import Service
from moesim.serving.economics import energy_j, instance_seconds, price_of
from moesim.serving.outcome import ITL_EDGES_S, Outcome

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
LATENCIES = ("ttft", "tpot", "itl", "e2e", "queueing")
"""Time to first token; time per output token after it, a request's mean; gaps between tokens; arrival to last token;
arrival to the first iteration."""


@dataclass(frozen=True)
class Window:
    """What is measured: latencies and SLO of requests that arrive in it, tokens and answers that come out in it.

    The default is all of a run. A later start leaves out filling up, an earlier end emptying out. Gaps between tokens,
    what the timeline has means of, energy and the breakdown are of the whole run all the same.
    """

    measure_from_s: float = 0.0
    measure_until_s: float = np.inf

    def of(self, outcome: Outcome) -> tuple[float, float]:
        """Its start and end in a run.

        Raises:
            ValueError: nothing of the run is in it.
        """
        start_s, end_s = self.measure_from_s, min(self.measure_until_s, outcome.seconds)
        if start_s < 0 or (end_s <= start_s and outcome.seconds > 0):
            raise ValueError(
                f"measured window: measure_from_s must be at least 0 and before measure_until_s and the end of the run "
                f"at {outcome.seconds:g} s; given {self.measure_from_s:g} to {self.measure_until_s:g}"
            )
        return start_s, end_s


ALL = Window()


def latencies(outcome: Outcome) -> dict[str, Floats]:
    """Seconds of each request by name in `LATENCIES` but "itl": NaN where a request did not come to it.

    A request of one output token has no time per output token: NaN too.
    """
    after_Q = outcome.generated_Q - 1
    span_Q = outcome.finish_s_Q - outcome.first_token_s_Q
    return {
        "ttft": outcome.first_token_s_Q - outcome.arrival_s_Q,
        "tpot": np.divide(span_Q, after_Q, out=np.full(len(span_Q), np.nan), where=after_Q > 0),
        "e2e": outcome.finish_s_Q - outcome.arrival_s_Q,
        "queueing": outcome.scheduled_s_Q - outcome.arrival_s_Q,
    }


def keeps_slo(outcome: Outcome, slo: Slo) -> Bools:
    """Whether each request was answered within all that is promised; one output token keeps any TPOT."""
    found = latencies(outcome)
    kept_Q = np.isfinite(outcome.finish_s_Q) & ~outcome.dropped_Q
    for name, most_s in (("ttft", slo.ttft_s), ("tpot", slo.tpot_s), ("e2e", slo.e2e_s)):
        if most_s is not None:
            kept_Q &= ~(found[name] > most_s)  # NaN, one output token, keeps it
    return kept_Q


def slo_attainment(outcome: Outcome, slo: Slo, window: Window = ALL) -> float:
    """Share of the decided requests that keep the SLO: those answered, and those refused, which do not.

    Requests that a stopped run left unanswered are not counted. NaN where none is decided.
    """
    decided_Q = _arrived(outcome, window) & (np.isfinite(outcome.finish_s_Q) | outcome.dropped_Q)
    num = int(decided_Q.sum())
    return float((keeps_slo(outcome, slo) & decided_Q).sum() / num) if num else float("nan")


def histogram_quantile(counts: NDArray[np.int64], share: float, edges_s: Floats = ITL_EDGES_S) -> float:
    """Where that share of a histogram's counts is reached, linear inside a bin (so off by at most its width)."""
    reached = np.concatenate([[0.0], np.cumsum(counts)])
    at = share * reached[-1]
    bin_ = min(int(np.searchsorted(reached, at, side="left")), len(counts)) - 1
    bin_ = max(bin_, int(np.flatnonzero(counts)[0]))
    return float(edges_s[bin_] + (edges_s[bin_ + 1] - edges_s[bin_]) * (at - reached[bin_]) / counts[bin_])


def tokens_out(outcome: Outcome, start_s: float, end_s: float) -> float:
    """Output tokens between two times, by the timeline: evenly inside each of its windows."""
    time_s = np.concatenate([[0.0], outcome.timeline["time_s"]])
    until = np.concatenate([[0.0], np.cumsum(np.diff(time_s) * outcome.timeline["output_tokens_per_s"])])
    return float(np.diff(np.interp([start_s, end_s], time_s, until))[0])


def latency_metrics(outcome: Outcome, window: Window = ALL) -> dict[str, float]:
    """Mean and quantiles of each of `LATENCIES`, such as ttft_p99_s, over the requests that came to it."""
    chosen_Q, found = _arrived(outcome, window), {}
    values_of = latencies(outcome)
    for name in LATENCIES:
        if name == "itl":
            counts = outcome.itl_counts
            if counts.sum():
                middle_s = (ITL_EDGES_S[:-1] + ITL_EDGES_S[1:]) / 2
                found["itl_mean_s"] = float(counts @ middle_s / counts.sum())
                found |= {f"itl_{key}_s": histogram_quantile(counts, share) for key, share in QUANTILES.items()}
            continue
        values = values_of[name][chosen_Q]
        values = values[np.isfinite(values)]
        if len(values):
            found[f"{name}_mean_s"] = float(values.mean())
            found |= {f"{name}_{key}_s": float(np.quantile(values, share)) for key, share in QUANTILES.items()}
    worst_Q = outcome.worst_itl_s_Q[chosen_Q & (outcome.generated_Q > 1)]
    if len(worst_Q) and np.isfinite(worst_Q).any():
        found["itl_max_s"] = float(np.nanmax(worst_Q))
    return found


def littles_law_ratio(outcome: Outcome) -> float:
    """Mean requests in the system by the timeline over arrival rate x mean time in it by the requests: 1 (Little 1961).

    NaN where nobody came. A request is in the system from its arrival until its last token, or the end of the run.
    """
    left_s_Q = np.where(np.isfinite(outcome.finish_s_Q), outcome.finish_s_Q, outcome.seconds)
    stayed_s_Q = np.where(outcome.dropped_Q | ~np.isfinite(outcome.arrival_s_Q), 0.0, left_s_Q - outcome.arrival_s_Q)
    rate_per_s, mean_s = len(stayed_s_Q) / outcome.seconds, float(stayed_s_Q.mean())
    if not rate_per_s * mean_s:
        return float("nan")
    width_s = np.diff(outcome.timeline["time_s"], prepend=0.0)
    present_s = float(np.nansum(width_s * (outcome.timeline["running"] + outcome.timeline["waiting"])))
    return present_s / outcome.seconds / (rate_per_s * mean_s)


def timeline_mean(outcome: Outcome, name: str, weight: str | None = None) -> float:
    """Mean over the run of a sample of the timeline, each window by its length (times another sample)."""
    values, time_s = outcome.timeline.get(name), outcome.timeline.get("time_s")
    if values is None or time_s is None or not len(values):
        return float("nan")
    width = np.diff(time_s, prepend=0.0) * (outcome.timeline[weight] if weight else 1.0)
    known = np.isfinite(values) & (width > 0)
    return float(np.average(values[known], weights=width[known])) if known.any() else float("nan")


def service_metrics(
    service: Service, outcome: Outcome, window: Window = ALL, power: str = "value", price: str = "value"
) -> dict[str, float]:
    """Every metric of a run that is defined; units in the names, those of the README.

    Args:
        power, price: "value", or the "low" or "high" end of what is assumed of devices' power, and of their price.
    """
    start_s, end_s = window.of(outcome)
    seconds, slo = end_s - start_s, service.slo
    arrived_Q, finished_Q = _arrived(outcome, window), (outcome.finish_s_Q >= start_s) & (outcome.finish_s_Q <= end_s)
    first_Q = (outcome.first_token_s_Q >= start_s) & (outcome.first_token_s_Q <= end_s)
    output, prompts = tokens_out(outcome, start_s, end_s), float(outcome.prompt_Q[first_Q].sum())
    found = latency_metrics(outcome, window)
    if seconds > 0:
        devices = outcome.device_s / outcome.seconds
        per_node = devices / service.cluster.devices_per_node
        for name, tokens in (("output", output), ("input", prompts), ("total", output + prompts)):
            found[f"{name}_tokens_per_s"] = tokens / seconds
            found[f"{name}_tokens_per_s_per_device"] = tokens / seconds / devices if devices else np.nan
            found[f"{name}_tokens_per_s_per_node"] = tokens / seconds / per_node if devices else np.nan
        found["requests_per_s"] = float(finished_Q.sum()) / seconds
        found["arrivals_per_s"] = float(arrived_Q.sum()) / seconds
        if (slo.ttft_s, slo.tpot_s, slo.e2e_s) != (None, None, None):
            found["goodput_requests_per_s"] = float((keeps_slo(outcome, slo) & finished_Q).sum()) / seconds
            found["slo_attainment_fraction"] = slo_attainment(outcome, slo, window)
        share = seconds / outcome.seconds
        costs = {"joules": energy_j(service, outcome, power) * share}
        known = price_of(service)
        if known:
            costs["usd"] = outcome.device_s * share / 3600 * known[0].at(price)
        for unit, cost in costs.items():
            found[f"{unit}_per_million_output_tokens"] = 1e6 * cost / output if output else np.nan
            found[f"{unit}_per_million_tokens"] = 1e6 * cost / (output + prompts) if output + prompts else np.nan
        found["utilization_fraction"] = outcome.busy_s / instance_seconds(outcome)
        found["littles_law_ratio"] = littles_law_ratio(outcome)
    found |= _fullness(outcome)
    sent_Q = np.isfinite(outcome.arrival_s_Q) & arrived_Q
    found |= {
        "num_requests": float(sent_Q.sum()),
        "num_finished": float((np.isfinite(outcome.finish_s_Q) & sent_Q).sum()),
        "num_unfinished": float((~np.isfinite(outcome.finish_s_Q) & ~outcome.dropped_Q & sent_Q).sum()),
        "num_dropped": float((outcome.dropped_Q & arrived_Q).sum()),
        "num_preemptions": float(outcome.preempted_Q[arrived_Q].sum()),
        "num_iterations": float(outcome.num_iterations),
        "duration_s": float(outcome.seconds),
    }
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def _fullness(outcome: Outcome) -> dict[str, float]:
    """KV cache, queue, running requests and imbalance over time; cached share of the prompts that were computed."""
    found = {
        "kv_mean_fraction": timeline_mean(outcome, "kv_fraction"),
        "num_running_mean": timeline_mean(outcome, "running"),
        "num_waiting_mean": timeline_mean(outcome, "waiting"),
        "imbalance_mean_ratio": timeline_mean(outcome, "imbalance", "running"),
    }
    for name, sample in (("kv_peak_fraction", "kv_fraction"), ("num_waiting_peak", "waiting")):
        values = outcome.timeline.get(sample)
        if values is not None and np.isfinite(values).any():
            found[name] = float(np.nanmax(values))
    reached_Q = np.isfinite(outcome.first_token_s_Q)
    prompts = outcome.prompt_Q[reached_Q].sum()
    if prompts:
        found["cached_tokens_fraction"] = float(outcome.cached_Q[reached_Q].sum() / prompts)
    return found


def _arrived(outcome: Outcome, window: Window) -> Bools:
    start_s, end_s = window.of(outcome)
    if window == ALL:
        return np.isfinite(outcome.arrival_s_Q)
    return (outcome.arrival_s_Q >= start_s) & (outcome.arrival_s_Q <= end_s)
