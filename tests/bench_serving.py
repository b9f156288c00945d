"""How fast services run: the part of `make bench` with requests."""

from __future__ import annotations

import time

import numpy as np

from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.fleet import Fleet
from moesim.requests import Requests
from moesim.routing.synthetic import zipf_trace
from moesim.service import EngineConfig, Service
from moesim.simulate.serving import simulate_service


def lengths(rng: np.random.Generator, num: int, mean: float, cv: float) -> np.ndarray:
    """Log-normal, so many tokens in all that the mean is exact."""
    sigma = np.sqrt(np.log(1 + cv**2))
    drawn = rng.lognormal(-(sigma**2) / 2, sigma, num)
    edges = np.round(np.cumsum(drawn) / drawn.sum() * num * mean).astype(np.int64)
    return np.maximum(np.diff(edges, prepend=0), 1)


def qwen(
    num: int, rate_per_s: float, output_tokens: float = 512.0, instances: int = 1, routing: str = "replayed"
) -> Service:
    """Qwen3-30B-A3B, one H100 an instance; prompts of 256 tokens and answers of 512 in the mean, as chats have."""
    model, rng = load_model("qwen3-30b-a3b"), np.random.default_rng(0)
    requests = Requests.of(
        np.cumsum(rng.exponential(1 / rate_per_s, num)),
        lengths(rng, num, 256, 1.0),
        lengths(rng, num, output_tokens, 1.0),
    )
    trace = zipf_trace(len(model.moe_layers), 128, 8, num_requests=256, prompt_tokens=96, output_tokens=64)
    return Service(
        "qwen", model, load_cluster("hgx-h100"), trace, requests, EngineConfig(routing=routing),
        fleet=Fleet(num_instances=instances, router="least_loaded"),
    )  # fmt: skip


def served_s(service: Service) -> float:
    """Seconds from a service to its outcome."""
    start = time.perf_counter()
    outcome = simulate_service(service)
    assert np.isfinite(outcome.finish_s_Q).all()
    return time.perf_counter() - start
