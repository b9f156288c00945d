"""Queues whose answers are known: an engine in which a token costs a constant is one of them."""

from dataclasses import replace

import numpy as np
import pytest
from serving_cases import small_service

from moesim.requests import Requests
from moesim.serving.instance import prices_of
from moesim.simulate.serving import simulate_service

TOKEN_S = 0.01


def constant(service, engine, bound):
    """Prices at which a token of an iteration takes `TOKEN_S`, whatever it is."""
    prices = prices_of(service, engine, bound)
    free = {
        name: np.zeros_like(getattr(prices, name))
        for name in ("token_s_ON", "head_s_N", "decode_s_VAC", "prefill_s_VXY")
    }
    free["token_s_ON"][0] = TOKEN_S * prices.grid_N / (prices.mixer_L == 0).sum()
    return prices._replace(host_s=0.0, place_LXE=prices.place_LXE[:0], moe_L=prices.moe_L * 0 - 1, **free)


def serve(arrival_s_Q, prompt_Q, output_Q, max_num_seqs):
    requests = Requests.of(arrival_s_Q, prompt_Q, output_Q)
    base = small_service(num=4)
    engine = replace(base.engine, tensor_parallel_size=1, max_num_seqs=max_num_seqs, max_num_batched_tokens=30_000)
    fleet = replace(base.fleet, num_instances=1)
    return simulate_service(replace(base, requests=requests, engine=engine, fleet=fleet), pricing=constant)


def poisson(rng, num, rate_per_s):
    return np.cumsum(rng.exponential(1 / rate_per_s, num))


def lindley(arrival_s_Q, service_s_Q):
    """Waits of a queue with one server, one after the other."""
    ready_s, waits = 0.0, np.empty(len(arrival_s_Q))
    for q, (at_s, service_s) in enumerate(zip(arrival_s_Q, service_s_Q, strict=True)):
        waits[q] = max(ready_s - at_s, 0.0)
        ready_s = max(ready_s, at_s) + service_s
    return waits


WORK = {
    "exponential": lambda rng, num, mean: np.maximum(rng.exponential(mean, num).round().astype(int), 1),
    "constant": lambda rng, num, mean: np.full(num, mean),
    "two lengths": lambda rng, num, mean: np.where(rng.random(num) < 0.9, mean * 4 // 10, mean * 64 // 10),
}


@pytest.mark.parametrize("kind", WORK)
def test_one_place_waits_as_a_queue_with_one_server_does(kind):
    rng = np.random.default_rng(1)
    output_Q = WORK[kind](rng, 2000, 20)
    arrival_s_Q = poisson(rng, 2000, 0.8 / (20 * TOKEN_S))
    outcome = serve(arrival_s_Q, np.ones(2000), output_Q, 1)
    waits = outcome.scheduled_s_Q - outcome.arrival_s_Q
    np.testing.assert_allclose(waits, lindley(arrival_s_Q, output_Q * TOKEN_S), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "squares"), [("exponential", 2.0), ("constant", 1.0)], ids=["M/M/1", "M/D/1"])
@pytest.mark.parametrize("load", [0.3, 0.6])
def test_mean_wait_is_pollaczek_and_khinchines(kind, squares, load):
    """Prompts alone, one after the other: load x E[S^2] / E[S] / 2 / (1 - load); `squares` is E[S^2] / E[S]^2."""
    rng, num, mean = np.random.default_rng(2), 400_000, 1000
    outcome = serve(poisson(rng, num, load / (mean * TOKEN_S)), WORK[kind](rng, num, mean), np.ones(num), 1)
    wait_s = (outcome.scheduled_s_Q - outcome.arrival_s_Q).mean()
    assert wait_s == pytest.approx(load * squares * mean * TOKEN_S / (2 * (1 - load)), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORK)
@pytest.mark.parametrize("load", [0.3, 0.6])
def test_a_batch_shares_the_processor(kind, load):
    """M/G/1-PS: the mean time does not depend on the distribution of the work. Load and work as they were drawn."""
    rng, num, mean = np.random.default_rng(3), 50_000, 100
    output_Q, arrival_s_Q = WORK[kind](rng, num, mean), poisson(rng, num, load / (mean * TOKEN_S))
    outcome = serve(arrival_s_Q, np.ones(num), output_Q, 4096)
    work_s = output_Q.mean() * TOKEN_S
    drawn = work_s * num / arrival_s_Q[-1]
    assert (outcome.finish_s_Q - outcome.arrival_s_Q).mean() == pytest.approx(work_s / (1 - drawn), rel=0.02)


def test_throughput_is_what_comes_up_to_saturation_and_capacity_beyond():
    rng, num, capacity_per_s = np.random.default_rng(4), 4000, 1 / (100 * TOKEN_S)
    for load, reached in ((0.5, 0.5), (0.9, 0.9), (1.5, 1.0)):
        outcome = serve(poisson(rng, num, load * capacity_per_s), np.full(num, 100), np.ones(num), 1)
        assert num / outcome.seconds == pytest.approx(reached * capacity_per_s, rel=0.05)
        assert outcome.busy_s / outcome.seconds == pytest.approx(reached, rel=0.05)
    waits = outcome.scheduled_s_Q - outcome.arrival_s_Q
    assert waits[-1] == pytest.approx(num / capacity_per_s * (1 - 1 / 1.5), rel=0.1)  # grows for as long as it lasts
