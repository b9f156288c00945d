"""Metrics of serving runs: hand-made answers, laws, and what is undefined and left out."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import queue, small_service

from moesim.fleet import Fleet, Slo
from moesim.requests import Requests
from moesim.serving.economics import POWER, compute_bound_s, economics_notes, energy_j, price_of
from moesim.serving.metrics import (
    Window,
    histogram_quantile,
    keeps_slo,
    latencies,
    latency_metrics,
    littles_law_ratio,
    service_metrics,
    slo_attainment,
    tokens_out,
)  # fmt: skip
from moesim.serving.outcome import ITL_EDGES_S
from moesim.serving.results import serving_result


def three(slo=Slo(), fleet=Fleet()):  # noqa: B008
    """Three requests by hand: a prompt takes 10 ms a token, each further token 100 ms, one request at a time.

    | request | arrives | starts | first token | last token |
    |       0 |       0 |      0 |         1.0 |        1.3 | (4 tokens)
    |       1 |       1 |    1.3 |         1.8 |        1.8 | (1 token)
    |       2 |     1.5 |    1.8 |         2.0 |        3.0 | (11 tokens)
    """
    service = small_service(slo=slo, fleet=fleet)
    requests = Requests.of(np.array([0.0, 1.0, 1.5]), np.array([100, 50, 20]), np.array([4, 1, 11]))
    service = replace(service, requests=requests)
    return service, queue(service, prompt_s=0.01, token_s=0.1)


def test_latencies_of_three_requests_by_hand():
    service, outcome = three()
    found = latencies(outcome)
    assert found["ttft"] == pytest.approx([1.0, 0.8, 0.5])
    assert found["e2e"] == pytest.approx([1.3, 0.8, 1.5])
    assert found["queueing"] == pytest.approx([0.0, 0.3, 0.3])
    assert found["tpot"] == pytest.approx([0.1, np.nan, 0.1], nan_ok=True)  # one token: no time per output token
    metrics = service_metrics(service, outcome)
    assert metrics["ttft_mean_s"] == pytest.approx(2.3 / 3)
    assert metrics["ttft_p50_s"] == pytest.approx(0.8)
    assert metrics["ttft_p90_s"] == pytest.approx(0.96)
    assert metrics["tpot_mean_s"] == pytest.approx(0.1)
    assert metrics["itl_p50_s"] == pytest.approx(0.1, rel=0.012)
    assert metrics["itl_mean_s"] == pytest.approx(0.1, rel=0.006)
    assert metrics["itl_max_s"] == pytest.approx(0.1)


def test_rates_of_three_requests_by_hand():
    service, outcome = three(fleet=Fleet(usd_per_device_hour=3.6))
    metrics = service_metrics(service, outcome)
    assert metrics["requests_per_s"] == metrics["arrivals_per_s"] == pytest.approx(1.0)
    assert metrics["output_tokens_per_s"] == pytest.approx(16 / 3)
    assert metrics["input_tokens_per_s"] == pytest.approx(170 / 3)
    assert metrics["total_tokens_per_s"] == pytest.approx(186 / 3)
    assert metrics["output_tokens_per_s_per_device"] == pytest.approx(4 / 3)
    assert metrics["output_tokens_per_s_per_node"] == pytest.approx(16 / 3)  # one node of four devices
    # 12 device seconds at 0.001 USD
    assert metrics["usd_per_million_output_tokens"] == pytest.approx(0.012 * 1e6 / 16)
    assert metrics["usd_per_million_tokens"] == pytest.approx(0.012 * 1e6 / 186)
    assert metrics["cached_tokens_fraction"] == pytest.approx((25 + 12 + 5) / 170)
    assert metrics["utilization_fraction"] == pytest.approx(2.8 / 3 + 0.2 / 3)
    assert metrics["num_running_mean"] == pytest.approx(1.0)
    assert metrics["num_waiting_mean"] == pytest.approx(0.6 / 3)


def test_promises_by_hand():
    service, outcome = three(Slo(ttft_s=0.9))
    assert keeps_slo(outcome, service.slo).tolist() == [False, True, True]
    assert keeps_slo(outcome, Slo(tpot_s=0.05)).tolist() == [False, True, False]  # one token keeps any TPOT
    assert keeps_slo(outcome, Slo(e2e_s=1.4)).tolist() == [True, True, False]
    metrics = service_metrics(service, outcome)
    assert metrics["slo_attainment_fraction"] == pytest.approx(2 / 3)
    assert metrics["goodput_requests_per_s"] == pytest.approx(2 / 3)
    refused = replace(
        outcome, dropped_Q=np.array([False, True, False]), finish_s_Q=np.array([1.3, np.nan, 3.0]),
        first_token_s_Q=np.array([1.0, np.nan, 2.0]), generated_Q=np.array([4, 0, 11]),
    )  # fmt: skip
    assert slo_attainment(refused, service.slo) == pytest.approx(1 / 3)
    assert service_metrics(service, refused)["num_dropped"] == 1
    assert "slo_attainment_fraction" not in service_metrics(three()[0], outcome)


def test_a_window_counts_what_is_in_it():
    service, outcome = three(Slo(ttft_s=0.9))
    metrics = service_metrics(service, outcome, Window(1.0, 2.5))
    assert metrics["ttft_mean_s"] == pytest.approx((0.8 + 0.5) / 2)  # of those that arrive in it
    assert metrics["requests_per_s"] == pytest.approx(2 / 1.5)  # of those that are answered in it
    # 1.0 (the first, with its last three until 1.3), 1.8, 2.0, and five more until 2.5; what is at its edges in part
    assert tokens_out(outcome, 1.0, 2.5) == pytest.approx(1 + 3 + 1 + 1 + 5, abs=1)
    assert metrics["input_tokens_per_s"] == pytest.approx(170 / 1.5)
    assert metrics["num_requests"] == 2
    with pytest.raises(ValueError, match=r"measure_from_s .* end of the run at 3 s; given 4 to inf"):
        service_metrics(service, outcome, Window(4.0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 12.0), st.lists(st.floats(0.01, 0.99), max_size=4))
def test_tokens_are_conserved_however_time_is_cut(seed, rate, cuts):
    outcome = queue(small_service(rate, 40, seed))
    times = [0.0, *(outcome.seconds * cut for cut in sorted(set(cuts))), outcome.seconds]
    parts = [tokens_out(outcome, a, b) for a, b in pairwise(times)]
    assert sum(parts) == pytest.approx(outcome.generated_Q.sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 12.0), st.floats(0.2, 1.0))
def test_littles_law_holds_also_in_a_run_that_was_stopped(seed, rate, part):
    service = small_service(rate, 60, seed)
    whole = queue(service)
    assert littles_law_ratio(whole) == pytest.approx(1.0)
    stopped = queue(service, until_s=part * whole.seconds)
    assert stopped.is_partial
    assert littles_law_ratio(stopped) == pytest.approx(1.0)


def test_littles_law_sees_requests_that_are_lost():
    outcome = queue(small_service())
    timeline = dict(outcome.timeline) | {"running": outcome.timeline["running"] * 0.5}
    assert littles_law_ratio(replace(outcome, timeline=timeline)) < 0.9


def test_mean_wait_of_a_queue_is_that_of_theory():
    """One server, times of service of one length (M/D/1): mean wait = load x service / 2 (1 - load)."""
    num, service_s, load = 40_000, 0.1, 0.6
    rng = np.random.default_rng(5)
    arrival_s_Q = np.cumsum(rng.exponential(service_s / load, num))
    requests = Requests.of(arrival_s_Q, np.full(num, 100), np.ones(num, int))
    outcome = queue(replace(small_service(), requests=requests), prompt_s=service_s / 100)
    waited_s = latency_metrics(outcome)["queueing_mean_s"]
    assert waited_s == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.05)


@given(st.lists(st.floats(2e-5, 900.0), min_size=1, max_size=200), st.floats(0.0, 1.0))
def test_quantiles_of_a_histogram_lie_within_a_bin_of_the_true_ones(gaps_s, share):
    counts, _ = np.histogram(gaps_s, ITL_EDGES_S)
    true_s = np.quantile(gaps_s, share, method="inverted_cdf")
    assert histogram_quantile(counts, share) == pytest.approx(true_s, rel=0.0117)


def test_undefined_metrics_are_left_out():
    service = small_service(num=5)
    stopped = queue(service, until_s=1e-9)
    metrics = service_metrics(service, stopped)
    assert not [name for name in metrics if name.startswith(("ttft", "e2e", "itl", "usd"))]
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["num_finished"] == 0


def test_energy_by_hand():
    """4 devices of 100 W for 3 s: all of the time in iterations, 0.7 of it computing."""
    service, outcome = three()
    bound_s = compute_bound_s(service, outcome)
    model = service.model
    flops = 2 * (model.num_active_params - model.embedding_params) * (170 - 42 + 16)
    assert bound_s == pytest.approx(flops / (1e13 * 0.5))  # bf16 peak, half of it reached
    waiting, memory, compute = (POWER[what].value for what in ("waiting", "memory_bound", "compute_bound"))
    expected = 100 * (waiting * 0.3 * 12 + memory * (0.7 * 12 - bound_s) + compute * bound_s)
    assert energy_j(service, outcome) == pytest.approx(expected)
    idle = replace(outcome, parts_s={}, busy_s=0.0)
    assert energy_j(service, idle) == pytest.approx(100 * POWER["idle"].value * 12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.floats(0.5, 12.0))
def test_energy_lies_between_idle_and_the_power_limit(seed, rate):
    service = small_service(rate, 30, seed)
    outcome = queue(service)
    low, value, high = (energy_j(service, outcome, bound) for bound in ("low", "value", "high"))
    assert POWER["idle"].low * 100 * outcome.device_s <= low < value < high <= 100 * outcome.device_s


def test_prices_are_given_or_assumed_or_left_out():
    service, outcome = three()
    assert price_of(service) is None
    assert "usd_per_million_tokens" not in service_metrics(service, outcome)
    assert any("give fleet.usd_per_device_hour" in note for note in economics_notes(service))
    device = replace(service.cluster.device, name="h800-sxm-80gb")
    h800 = replace(service, cluster=replace(service.cluster, device=device))
    assert service_metrics(h800, outcome)["usd_per_million_tokens"] == pytest.approx(12 / 3600 * 2 * 1e6 / 186)
    assert any("assumed" in note and "DeepSeek" in note for note in economics_notes(h800))


def test_intervals_hold_the_value_and_have_no_width_where_nothing_moves():
    service = small_service(slo=Slo(ttft_s=0.3))
    result = serving_result(service, queue(service), ends={end: queue(service, end) for end in ("low", "high")})
    for name, (low, high) in result.intervals.items():
        assert low <= result.metrics[name] <= high
        assert low < high
    assert "ttft_p99_s" in result.intervals
    assert "num_requests" not in result.intervals
    assert "cached_tokens_fraction" not in result.intervals


def test_what_is_not_whole_is_said():
    service = small_service()
    whole = queue(service)
    result = serving_result(service, queue(service, until_s=whole.seconds / 2))
    assert result.is_partial
    assert any("PARTIAL" in warning for warning in result.warnings)
    left = sum(np.isnan(result.outcome.finish_s_Q))
    assert any(f"{left} of 200 requests were not answered" in warning for warning in result.warnings)
    assert not serving_result(service, whole).is_partial
