"""The runs behind one answer: at the value and both ends of belief, and those of a search for the maximum rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from moesim.service import Service
from moesim.serving.find import RateSearch, Tried, find_rate
from moesim.serving.metrics import ALL, Window, slo_attainment
from moesim.serving.outcome import Outcome
from moesim.serving.results import ServingResult, serving_result

Simulate = Callable[[Service, str], Outcome]
"""An engine: plays a service at "value", "low" or "high"; interrupted (Ctrl-C), it returns a partial outcome."""
SPAN = 64.0
"""How far a search goes from the rate of the scenario, down and up, as a factor."""


def run_service(service: Service, simulate: Simulate, window: Window = ALL) -> ServingResult:
    """Run a service at the value, and at both ends of its believed efficiencies.

    Interrupted, what was done by then is the answer: no run follows, and there are no intervals.
    """
    middle = simulate(service, "value")
    if middle.is_partial and middle.seconds <= window.measure_from_s:
        window = ALL  # stopped before there was anything in it
    return _with_ends(service, middle, simulate, window)


def run_at_highest_rate(
    service: Service, simulate: Simulate, tell: Callable[[Tried], None] = lambda tried: None
) -> ServingResult:
    """Find the highest rate of arrivals at which `Slo.attainment` of the requests keep the promise, and run there.

    The same requests are sent at every rate, from a `SPAN`-th to `SPAN` times the scenario's; efficiencies are at
    their value. Where no rate keeps the promise, the result is the run at the lowest one, and `max_requests_per_s` is
    not among its metrics.

    Raises:
        ValueError: nothing is promised, or requests do not arrive at a rate.
    """
    check_findable(service)
    first_per_s = service.requests.rate_per_s
    best: tuple[float, Service, Outcome] | None = None
    lowest: tuple[float, Service, Outcome] | None = None

    def attainment_of(rate_per_s: float) -> float:
        nonlocal best, lowest
        asked = replace(service, requests=service.requests.at_rate(rate_per_s))
        outcome = simulate(asked, "value")
        run, kept = (rate_per_s, asked, outcome), slo_attainment(outcome, service.slo)
        if lowest is None or rate_per_s < lowest[0]:
            lowest = run
        if outcome.is_partial:
            raise KeyboardInterrupt
        if kept >= service.slo.attainment and (best is None or rate_per_s > best[0]):
            best = run
        return kept

    low_per_s, high_per_s = first_per_s / SPAN, first_per_s * SPAN
    search = find_rate(attainment_of, service.slo.attainment, first_per_s, low_per_s, high_per_s, tell=tell)
    shown = best or lowest
    if shown is None:
        raise KeyboardInterrupt
    rate_per_s, asked, outcome = shown
    is_whole = not search.is_partial
    result = _with_ends(asked, outcome, simulate, ALL) if is_whole else serving_result(asked, outcome)
    return _with_search(result, search, rate_per_s)


def check_findable(service: Service) -> None:
    """Refuse a search that has no answer.

    Raises:
        ValueError: nothing is promised, or requests do not arrive at a rate.
    """
    slo, requests = service.slo, service.requests
    if (slo.ttft_s, slo.tpot_s, slo.e2e_s) == (None, None, None):
        raise ValueError(f"{service.name}: --find rate needs a promise: give slo.ttft_s, slo.tpot_s or slo.e2e_s")
    if requests.concurrency is not None:
        raise ValueError(
            f"{service.name}: --find rate needs arrivals that do not wait for answers; given a closed loop of "
            f"{requests.concurrency} clients: take the concurrency away, and give a rate"
        )
    if not math.isfinite(requests.rate_per_s):
        raise ValueError(f"{service.name}: --find rate needs arrivals over time; given all requests at once")


def _with_ends(service: Service, middle: Outcome, simulate: Simulate, window: Window) -> ServingResult:
    ends: dict[str, Outcome] = {}
    for bound in ("low", "high"):
        if middle.is_partial or any(end.is_partial for end in ends.values()):
            break
        ends[bound] = simulate(service, bound)
    is_whole = len(ends) == 2 and not any(end.is_partial for end in ends.values())
    result = serving_result(service, middle, window, ends if is_whole else None)
    if is_whole or middle.is_partial:
        return result
    note = "PARTIAL: stopped in the runs at both ends of belief: metrics are whole, but without intervals"
    return replace(result, is_stopped=True, warnings=(note, *result.warnings))


def _with_search(result: ServingResult, search: RateSearch, rate_per_s: float) -> ServingResult:
    metrics = dict(result.metrics)
    if search.rate_per_s is not None:
        metrics["max_requests_per_s"] = search.rate_per_s
    note = f"{search.says} Shown is the run at {rate_per_s:.4g} requests/s."
    return replace(result, metrics=metrics, search=search, warnings=(note, *result.warnings))
