"""From the table [requests] to the requests: read, drawn, or both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from moesim import arrivals
from moesim.arrivals import Bursts, Extent, Floats, Ints
from moesim.files.requests.read import Traffic, read_traffic
from moesim.files.requests.servegen import is_profiles, read_profiles
from moesim.files.requests.spec import MOST, LengthSpec, RequestsSpec, length_of
from moesim.requests import Requests


def build_requests(spec: RequestsSpec, path: Path | None, rng: np.random.Generator) -> Requests:
    """The traffic of a spec without mistakes.

    path: of the spec's file, where it names one.

    Raises:
        ValueError: the file cannot serve; what is wrong with its rows, or with the keys beside it.
    """
    if path is not None and is_profiles(path):
        return _sampled(spec, path, rng)
    traffic = read_traffic(path) if path is not None else None
    if spec.arrivals == "replayed":
        assert traffic is not None
        return _replayed(spec, traffic)
    arrival_s = arrival_times(spec, len(traffic.requests) if traffic else None, rng)
    if traffic is not None:
        requests = _at_other_times(spec, traffic.requests, arrival_s, rng)
    else:
        assert spec.prompt_tokens is not None and spec.output_tokens is not None
        prompt = _drawn(length_of(spec.prompt_tokens), len(arrival_s), rng)
        requests = Requests.of(arrival_s, prompt, _drawn(length_of(spec.output_tokens), len(arrival_s), rng), "drawn")
    if not len(requests):
        raise ValueError(f"no request comes in {spec.duration_s} s at {spec.rate_per_s} a second; ask for more")
    return replace(requests, concurrency=spec.concurrency, think_s=spec.think_s or 0.0)


def arrival_times(spec: RequestsSpec, in_file: int | None, rng: np.random.Generator) -> Floats:
    """Times of a process; all 0 where requests come at once or wait for each other.

    in_file: requests of the file, where there is one.

    Raises:
        ValueError: there would be too many bursts.
    """
    extent = Extent(spec.num_requests, spec.duration_s)
    if spec.num_requests is None and spec.duration_s is None:
        extent = Extent(in_file)
    rate = spec.rate_per_s or 0.0
    if spec.arrivals in ("at_once", "closed"):
        return np.zeros(extent.num or 0)
    if spec.arrivals == "constant":
        return arrivals.constant(extent, rate)
    if spec.arrivals == "gamma":
        found = arrivals.gamma(rng, extent, rate, spec.cv or 1.0)
    elif spec.arrivals == "bursty":
        assert spec.burst_ratio is not None and spec.burst_fraction is not None and spec.burst_s is not None
        seconds = extent.duration_s if extent.num is None else extent.num / rate
        if (seconds or 0.0) * spec.burst_fraction / spec.burst_s > MOST:
            raise ValueError(f"burst_s = {spec.burst_s} makes more than {MOST} bursts in {seconds} s; use longer ones")
        found = arrivals.bursty(rng, extent, rate, Bursts(spec.burst_ratio, spec.burst_fraction, spec.burst_s))
    else:
        found = arrivals.poisson(rng, extent, rate)
    if spec.diurnal_depth is not None and spec.diurnal_period_s is not None:
        found = arrivals.diurnal(found, spec.diurnal_depth, spec.diurnal_period_s)
    return found


def _drawn(length: LengthSpec | int, num: int, rng: np.random.Generator) -> Ints:
    if isinstance(length, int):
        return np.full(num, length, np.int64)
    mean, cv = length.mean or 1.0, length.cv or 1.0
    if length.distribution == "lognormal":
        found = arrivals.lognormal_tokens(rng, num, mean, cv)
    elif length.distribution == "exponential":
        found = arrivals.geometric_tokens(rng, num, mean)
    else:
        found = arrivals.uniform_tokens(rng, num, length.low or 1, length.high or 1)
    return found if length.most is None else np.minimum(found, length.most)


def _replayed(spec: RequestsSpec, traffic: Traffic) -> Requests:
    requests, scale, start_s = traffic.requests, spec.rate_scale or 1.0, spec.start_s or 0.0
    if not traffic.has_times:
        hint = traffic.hint or 'another process, such as arrivals = "poisson" with rate_per_s'
        raise ValueError(f"{requests.source} has lengths, but no times to replay; give {hint}")
    later = requests.take(np.flatnonzero(requests.arrival_s_Q >= start_s))
    arrival_s = (later.arrival_s_Q - start_s) / scale
    found = replace(later, arrival_s_Q=arrival_s)
    if spec.duration_s is not None:
        found = found.take(np.flatnonzero(arrival_s < spec.duration_s))
    found = _first(found, spec.num_requests)
    if not len(found):
        raise ValueError(
            f"{requests.source} has no request from start_s = {start_s} on for duration_s = {spec.duration_s}; its "
            f"last one comes at {requests.arrival_s_Q[-1]} s"
        )
    return _numbered(found)


def _first(requests: Requests, num: int | None) -> Requests:
    """So many of the requests, or all, with a note where there are fewer."""
    if num is None:
        return requests
    found = requests.take(np.arange(min(len(requests), num)))
    if len(found) == num:
        return found
    return replace(found, notes=(*found.notes, f"the file has {len(found)} of {num} requests"))


def _at_other_times(spec: RequestsSpec, given: Requests, arrival_s: Floats, rng: np.random.Generator) -> Requests:
    num = len(arrival_s)
    if spec.order == "random":
        rows = rng.integers(len(given), size=num)
        drawn = Requests.of(arrival_s, given.prompt_Q[rows], given.output_Q[rows], given.source)
        return replace(drawn, notes=(*given.notes, f"lengths are drawn from {len(given)} requests of the file"))
    found = replace(given.take(np.arange(num) % len(given)), arrival_s_Q=arrival_s)
    if num > len(given):
        note = f"{num} requests take the {len(given)} of the file more than once, with the same prefixes"
        found = replace(found, notes=(*found.notes, note))
    return _numbered(found)


def _numbered(requests: Requests) -> Requests:
    """Blocks numbered 0, 1, ... again, after some requests were left out."""
    dense = np.unique(requests.block_ids, return_inverse=True)[1]
    return replace(requests, block_ids=dense.astype(np.int64))


def _sampled(spec: RequestsSpec, path: Path, rng: np.random.Generator) -> Requests:
    if spec.arrivals != "replayed":
        raise ValueError(
            f'{path}: client profiles have their own times; use arrivals = "replayed" (rate_scale changes the rate)'
        )
    profiles = read_profiles(path)
    found = profiles.sample(
        rng, start_s=spec.start_s or 0.0, duration_s=spec.duration_s, rate_scale=spec.rate_scale or 1.0
    )
    if not len(found):
        raise ValueError(f"{path}: no request comes from start_s = {spec.start_s or 0.0} on; ask for a longer time")
    return _first(found, spec.num_requests)
