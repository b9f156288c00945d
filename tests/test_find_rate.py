"""The search for the highest rate: against queues with a known answer, and where there is none."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import queue, small_service

from moesim.fleet import Slo
from moesim.serving.find import find_rate
from moesim.serving.metrics import slo_attainment
from moesim.serving.runs import run_at_highest_rate, run_service


def mm1_attainment(served_per_s: float, most_s: float):
    """M/M/1: the time in the system is exponential with rate served - arriving."""
    return lambda rate: 1 - math.exp(-(served_per_s - rate) * most_s) if rate < served_per_s else 0.0


def test_the_highest_rate_of_an_mm1_queue():
    served, most_s, target = 100.0, 0.1, 0.9
    true = served + math.log(1 - target) / most_s
    search = find_rate(mm1_attainment(served, most_s), target, 10.0, 0.1, 1000.0)
    assert search.is_bracketed
    assert search.rate_per_s <= true <= search.rate_per_s * 1.02
    assert f"{search.rate_per_s:.4g} requests/s keep the SLO" in search.says


@settings(max_examples=60)
@given(st.floats(0.01, 1e4), st.floats(0.05, 20.0), st.floats(0.5, 0.99))
def test_any_start_leads_to_the_same_rate(served, factor, target):
    most_s = 10 / served
    true = served + math.log(1 - target) / most_s
    start = served * factor
    search = find_rate(mm1_attainment(served, most_s), target, start, start / 1e3, start * 1e3)
    assert search.rate_per_s <= true * (1 + 1e-9) <= search.rate_per_s * (1.02 + 1e-9)
    assert len(search.tried) < 25


def test_even_the_lowest_rate_fails():
    search = find_rate(lambda rate: 0.5, 0.9, 8.0, 1.0, 64.0)
    assert search.rate_per_s is None
    assert [item.rate_per_s for item in search.tried] == [8.0, 4.0, 2.0, 1.0]
    assert "Even at 1 requests/s only 50 % keep the SLO (90 % must)" in search.says


def test_no_rate_fails():
    search = find_rate(lambda rate: 1.0, 0.9, 8.0, 1.0, 50.0)
    assert search.rate_per_s == 50.0
    assert not search.is_bracketed
    assert "No limit up to 50 requests/s" in search.says


def test_an_interrupt_keeps_what_is_known():
    def attainment(rate):
        if rate > 30:
            raise KeyboardInterrupt
        return 1.0

    search = find_rate(attainment, 0.9, 8.0, 1.0, 100.0)
    assert search.is_partial
    assert search.rate_per_s == 16.0
    assert search.says.startswith("Stopped before its end")


@pytest.mark.parametrize(
    ("bounds", "says"),
    [((0.0, 1, 1, 1), "slo.attainment"), ((0.9, 1, 2, 3), "lowest"), ((0.9, 1, 0, 3), "lowest"),
     ((0.9, 3, 1, math.inf), "infinity")],
)  # fmt: skip
def test_wrong_bounds_are_refused(bounds, says):
    with pytest.raises(ValueError, match=says):
        find_rate(lambda rate: 1.0, *bounds)


def test_a_service_at_its_highest_rate():
    service, tried = small_service(1.0, slo=Slo(ttft_s=0.5, attainment=0.9)), []
    result = run_at_highest_rate(service, queue, tried.append)
    rate = result.metrics["max_requests_per_s"]
    assert tuple(tried) == result.search.tried
    assert result.metrics["slo_attainment_fraction"] >= 0.9
    assert result.outcome.arrival_s_Q == pytest.approx(service.requests.at_rate(rate).arrival_s_Q)
    above = min(item.rate_per_s for item in tried if item.attainment < 0.9)
    again = queue(replace(service, requests=service.requests.at_rate(above)))
    assert above <= rate * 1.02
    assert slo_attainment(again, service.slo) < 0.9
    assert result.as_json()["search"] == run_at_highest_rate(service, queue).as_json()["search"]
    assert "ttft_p99_s" in result.intervals


def test_a_service_that_never_keeps_its_promise_is_shown_at_the_lowest_rate():
    service = small_service(1.0, 20, slo=Slo(tpot_s=1e-3))
    result = run_at_highest_rate(service, queue)
    assert "max_requests_per_s" not in result.metrics
    assert result.search.rate_per_s is None
    lowest = service.requests.rate_per_s / 64
    assert result.search.tried[-1].rate_per_s == lowest
    assert result.warnings[0].endswith(f"Shown is the run at {lowest:.4g} requests/s.")


def test_a_search_that_is_stopped_shows_its_best_run():
    runs = []

    def engine(service, bound):
        runs.append(bound)
        return queue(service, bound, until_s=np.inf if len(runs) < 3 else 1.0)

    result = run_at_highest_rate(small_service(1.0, slo=Slo(ttft_s=0.5)), engine)
    assert result.is_partial
    assert len(runs) == 3
    assert result.metrics["max_requests_per_s"] == pytest.approx(2 * result.search.tried[0].rate_per_s)
    assert not result.intervals


def test_runs_that_are_stopped_leave_no_intervals_and_say_so():
    def stopped_at(last):
        return lambda service, bound: queue(service, bound, until_s=1.0 if bound == last else np.inf)

    service = small_service()
    at_once, later = run_service(service, stopped_at("value")), run_service(service, stopped_at("low"))
    assert at_once.is_partial
    assert later.is_partial
    assert not at_once.intervals
    assert not later.intervals
    assert later.metrics["num_finished"] == 200
    assert "without intervals" in later.warnings[0]
    assert not run_service(service, queue).is_partial


def test_a_search_needs_a_promise_and_a_rate():
    service = small_service(slo=Slo(ttft_s=1.0))
    with pytest.raises(ValueError, match=r"give slo\.ttft_s"):
        run_at_highest_rate(small_service(), queue)
    with pytest.raises(ValueError, match="closed loop of 3 clients"):
        run_at_highest_rate(replace(service, requests=replace(service.requests, concurrency=3)), queue)
    at_once = replace(service.requests, arrival_s_Q=np.zeros(len(service.requests)))
    with pytest.raises(ValueError, match="all requests at once"):
        run_at_highest_rate(replace(service, requests=at_once), queue)
