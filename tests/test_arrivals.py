"""Traffic that is made up: when requests come, how long they are, and what the seed decides."""

from __future__ import annotations

import numpy as np
import pytest
from serving_cases import service_file

from moesim import arrivals, verbs
from moesim.files.requests.build import arrival_times
from moesim.files.requests.spec import RequestsSpec
from moesim.files.services import load_services
from moesim.requests import Requests

PROCESSES = {
    "poisson": {}, "gamma": {"cv": 2.0}, "bursty": {"burst_ratio": 9.0, "burst_fraction": 0.2, "burst_s": 0.5},
    "constant": {},
}  # fmt: skip


def long_run(name, rate):
    """Squared coefficient of variation of the gaps, and variance over mean of the arrivals in a long time.

    A gap of a Markov-modulated process ends by an arrival or changes its state before: its moments are
    n! p (L - Q)^-n 1, with p the states that arrivals find (Fischer and Meier-Hellstern 1993, section 2).
    """
    if name != "bursty":
        return ({"poisson": 1.0, "gamma": 4.0, "constant": 0.0}[name],) * 2
    ratio, fraction, burst_s = PROCESSES[name].values()
    share = np.array([1 - fraction, fraction])
    rates = np.array([1.0, ratio]) * rate / (share @ [1.0, ratio])
    leave = np.array([fraction / (1 - fraction), 1.0]) / burst_s
    inverse = np.linalg.inv(np.diag(rates + leave) - np.diag(leave)[:, ::-1])
    seen = share * rates / (share @ rates)
    cv2 = 2 * seen @ inverse @ inverse @ np.ones(2) / (seen @ inverse @ np.ones(2)) ** 2 - 1
    return cv2, 1 + 2 * share.prod() * np.diff(rates)[0] ** 2 / (leave.sum() * rate)


def times(name, seed, rate=50.0, **extent):
    spec = RequestsSpec(name, rate_per_s=rate, prompt_tokens=1, output_tokens=1, **PROCESSES[name], **extent)
    assert not spec.mistakes()
    return arrival_times(spec, None, np.random.default_rng(seed))


@pytest.mark.parametrize("name", PROCESSES)
def test_gaps_have_their_mean_and_variation(name):
    gap_s = np.diff(times(name, 1, num_requests=1_000_001)).reshape(50, -1)  # 50 stretches of 400 s
    assert (gap_s >= 0).all()
    for of_each, wanted in [(gap_s.mean(axis=1), 1 / 50), ((gap_s**2).mean(axis=1) * 50**2 - 1, long_run(name, 50)[0])]:
        error = of_each.std(ddof=1) / np.sqrt(50)
        assert abs(of_each.mean() - wanted) < 4 * error + 1e-9, (of_each.mean(), wanted, error)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_duration_holds_its_rate_and_the_seed_decides(name):
    found = times(name, 1, duration_s=4000.0)
    assert abs(len(found) - 50 * 4000) <= 3 * np.sqrt(long_run(name, 50)[1] * 50 * 4000)
    assert found.max() < 4000
    np.testing.assert_array_equal(found, times(name, 1, duration_s=4000.0))
    assert np.array_equal(found, times(name, 2, duration_s=4000.0)) == (name == "constant")


def test_bursts_are_as_likely_at_the_start_as_later():
    counts = [len(times("bursty", seed, duration_s=0.1)) for seed in range(4000)]
    assert abs(np.mean(counts) - 5) < 4 * np.std(counts) / np.sqrt(4000)


def test_the_seed_of_a_service_is_that_of_its_traffic(tmp_path):
    table = 'arrivals = "gamma"\nrate_per_s = 9\ncv = 2\nnum_requests = 99\nprompt_tokens = 5\noutput_tokens = 5'
    path = service_file(tmp_path, table)
    first, again, other = (load_services(path, [f"seed={seed}"])[0].requests.arrival_s_Q for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_days_swing_without_more_requests():
    given = arrivals.poisson(np.random.default_rng(1), arrivals.Extent(duration_s=2000.0), 50.0)
    found = arrivals.diurnal(given, 0.6, 20.0)
    by_day = (found % 20 < 10).mean()  # the integral of 1 + 0.6 sin over the first half
    assert by_day == pytest.approx(0.5 + 0.6 / np.pi, abs=4 * 0.5 / np.sqrt(len(given)))
    assert (np.diff(found) >= 0).all() and found.max() < 2000


def test_another_rate_stretches_all_gaps():
    given = Requests.of(np.array([1.0, 1.5, 3.0]), np.ones(3), np.ones(3))
    assert given.rate_per_s == 1.0
    assert given.at_rate(4.0).arrival_s_Q.tolist() == [1.0, 1.125, 1.5]


LENGTHS = {
    "lognormal": ('mean = 900, cv = 1.2', 900, 900 * 1.2), "exponential": ("mean = 40", 40, np.sqrt(40 * 39)),
    "uniform": ("low = 3, high = 7", 5, np.sqrt(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", LENGTHS)
def test_drawn_lengths_have_their_mean_and_spread(tmp_path, name):
    keys, mean, spread = LENGTHS[name]
    table = (
        f'arrivals = "at_once"\nnum_requests = 100000\noutput_tokens = {{distribution = "{name}", {keys}, most = 5}}\n'
    )
    path = service_file(tmp_path, f'{table}prompt_tokens = {{distribution = "{name}", {keys}}}')
    found = load_services(path)[0].requests
    assert found.prompt_Q.mean() == pytest.approx(mean, abs=4 * spread / np.sqrt(100_000))
    assert found.prompt_Q.std() == pytest.approx(spread, rel=0.06)
    assert (found.prompt_Q.min() >= 1, found.output_Q.max()) == (True, 5)


def test_clients_of_a_closed_loop_wait_for_their_answers_and_think(tmp_path):
    table = 'arrivals = "closed"\nconcurrency = 3\nthink_s = 0.25\nnum_requests = 12\nprompt_tokens = 10'
    service = load_services(service_file(tmp_path, f"{table}\noutput_tokens = 10"))[0]
    assert (service.requests.concurrency, service.requests.think_s) == (3, 0.25)
    assert not service.requests.arrival_s_Q.any()
    outcome = verbs.simulate_service(service)
    sent_s, left_s = np.sort(outcome.arrival_s_Q), np.sort(outcome.finish_s_Q)
    assert not sent_s[:3].any()
    np.testing.assert_allclose(sent_s[3:], left_s[:9] + 0.25)
