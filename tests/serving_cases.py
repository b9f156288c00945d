"""Made-up outcomes of serving runs: a queue with one server, played by its definition."""

from __future__ import annotations

import numpy as np
from conftest import small_cluster, small_model

from moesim.fleet import Fleet, Slo
from moesim.requests import Requests
from moesim.routing.synthetic import zipf_trace
from moesim.service import EngineConfig, Service
from moesim.serving.outcome import ITL_EDGES_S, Outcome
from moesim.serving.work import PARTS


def small_service(rate_per_s=4.0, num=200, seed=0, slo=Slo(), fleet=Fleet(), name="small"):  # noqa: B008
    rng = np.random.default_rng(seed)
    model = small_model()
    arrival_s_Q = np.cumsum(rng.exponential(1 / rate_per_s, num))
    requests = Requests.of(arrival_s_Q, rng.integers(10, 2000, num), rng.integers(1, 60, num), "made up")
    routed = model.experts
    trace = zipf_trace(
        len(model.moe_layers), routed.num_experts, routed.top_k, num_requests=4, prompt_tokens=4, output_tokens=4
    )
    plain = {"name": name, "requests": {"rate_per_s": rate_per_s}}
    engine = EngineConfig(tensor_parallel_size=4)
    return Service(name, model, small_cluster(), trace, requests, engine, fleet=fleet, slo=slo, seed=seed, plain=plain)


def service_file(folder, requests, more=""):
    """A service file whose table [requests] is that text."""
    path = folder / "service.toml"
    parts = 'model = "olmoe-1b-7b"\nhardware = "hgx-h100"\ntrace = "olmoe-shape-16x64"'
    path.write_text(f"{parts}\n[requests]\n{requests}\n{more}")
    return path


def queue(service, bound="value", prompt_s=2e-5, token_s=5e-3, until_s=np.inf, cap=64) -> Outcome:
    """Requests one after the other: a prompt takes `prompt_s` a token, each further token `token_s`."""
    factor = {"value": 1.0, "low": 1.3, "high": 0.8}[bound]
    r = service.requests
    num, now_s = len(r), 0.0
    start_s_Q, first_s_Q, finish_s_Q = np.full((3, num), np.nan)
    generated_Q, counts = np.zeros(num, np.int64), np.zeros(len(ITL_EDGES_S) - 1, np.int64)
    token_s_G = []
    bin_ = np.searchsorted(ITL_EDGES_S, token_s * factor, side="right") - 1
    for q in range(num):
        start_s = max(now_s, r.arrival_s_Q[q])
        first_s = start_s + prompt_s * factor * r.prompt_Q[q]
        now_s = first_s + token_s * factor * (r.output_Q[q] - 1)
        if start_s >= until_s:
            break
        start_s_Q[q] = start_s
        if first_s <= until_s:
            first_s_Q[q] = first_s
            generated_Q[q] = r.output_Q[q] if now_s <= until_s else 1 + (until_s - first_s) // (token_s * factor)
            counts[bin_] += generated_Q[q] - 1
            token_s_G.append(first_s + token_s * factor * np.arange(generated_Q[q]))
        if now_s <= until_s:
            finish_s_Q[q] = now_s
    seconds = min(now_s, until_s)
    is_stopped = bool(np.isfinite(until_s))
    arrival_s_Q = np.where(r.arrival_s_Q <= seconds, r.arrival_s_Q, np.nan)
    time_s = np.linspace(0, seconds, cap + 1)
    tokens = np.histogram(np.minimum(np.concatenate([[], *token_s_G]), seconds), time_s)[0]
    left_s_Q = np.where(np.isfinite(finish_s_Q), finish_s_Q, seconds)
    begun_s_Q = np.where(np.isfinite(start_s_Q), start_s_Q, seconds)
    waiting, running = _present(arrival_s_Q, begun_s_Q, time_s), _present(start_s_Q, left_s_Q, time_s)
    busy_s = float(running.sum() * (time_s[1]))
    parts = dict.fromkeys(PARTS, 0.0) | {
        "attention": 0.3,
        "experts": 0.4,
        "dispatch": 0.1,
        "imbalance": 0.15,
        "host": 0.05,
    }
    waves = 1.2 + 0.3 * np.sin(np.arange(cap) / 5)
    minus, whole = np.full(num, -1), np.zeros(num, np.int64)
    return Outcome(
        arrival_s_Q, start_s_Q, first_s_Q, finish_s_Q, r.prompt_Q, r.output_Q, generated_Q, r.prompt_Q // 4, whole,
        np.where(generated_Q > 1, token_s * factor, np.nan), whole, whole, np.zeros(num, bool), minus, whole, counts,
        {"time_s": time_s[1:], "running": running, "waiting": waiting, "kv_fraction": np.clip(waiting / 20, 0, 1),
         "imbalance": waves, "output_tokens_per_s": tokens / time_s[1], "instances": np.ones(cap)},
        {part: share * busy_s for part, share in parts.items()},
        {"measured_fraction": 0.5, "fitted_fraction": 0.2, "datasheet_fraction": 0.1, "assumed_fraction": 0.2},
        busy_s, max(1, int(generated_Q.sum())), 4 * seconds, seconds, is_stopped,
    )  # fmt: skip


def _present(from_s_Q, to_s_Q, time_s):
    """Mean number of intervals that hold a time, over each window."""
    known = np.isfinite(from_s_Q)
    from_s_Q, to_s_Q = from_s_Q[known, None], to_s_Q[known, None]
    inside = np.minimum(to_s_Q, time_s[None, 1:]) - np.maximum(from_s_Q, time_s[None, :-1])
    return np.clip(inside, 0, None).sum(axis=0) / np.diff(time_s)
