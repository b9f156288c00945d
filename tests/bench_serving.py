"""How fast services run: the part of `make bench` with requests."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from rich.progress import Progress

from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.services import load_services
from moesim.fleet import Fleet
from moesim.requests import Requests
from moesim.routing.synthetic import zipf_trace
from moesim.service import EngineConfig, Service
from moesim.simulate.serving import simulate_service

PEERS = {
    "serving_300_requests_s": "BLIS (Go, uniform routing) 1.04 s; LLMServingSim reports 24 s for a like run",
    "serving_5000_requests_s": "BLIS 14.2 s",
    "serving_8_instances_10000_requests_s": "BLIS is not done in 300 s",
}
"""What others take for the same on the same kind of machine."""
R1_CLIENTS = Path(__file__).parents[2] / "shared/data/requests_servegen/reason_deepseek-r1_rates.parquet"
DAY = """
name = "day"
model = "deepseek-r1"
hardware = "40 x hgx-h800"
trace = "zipf:0.5"
[requests]
{arrivals}
duration_s = 86400
[engine]
data_parallel_size = 32
enable_expert_parallel = true
all2all_backend = "deepep_low_latency"
num_redundant_experts = 32
max_num_seqs = 128
max_num_batched_tokens = 4096
routing = "memoised"
"""
LIKE_THEM = """
arrivals = "poisson"
rate_per_s = 15.0
diurnal_depth = 0.5
diurnal_period_s = 86400
prompt_tokens = {distribution = "lognormal", mean = 1040, cv = 2.0, most = 32768}
output_tokens = {distribution = "lognormal", mean = 1370, cv = 1.0, most = 32768}
"""


def lengths(rng: np.random.Generator, num: int, mean: float) -> np.ndarray:
    """Log-normal with a coefficient of variation of 1, scaled so that their mean is exact."""
    drawn = rng.lognormal(0.0, np.sqrt(np.log(2)), num)
    edges = np.round(np.cumsum(drawn) / drawn.sum() * num * mean).astype(np.int64)
    return np.maximum(np.diff(edges, prepend=0), 1)


def qwen(num: int, rate_per_s: float, output_tokens: float = 512.0, instances: int = 1) -> Service:
    """Qwen3-30B-A3B on one H100 an instance, every token routed by its own row of a trace."""
    model, rng = load_model("qwen3-30b-a3b"), np.random.default_rng(0)
    arrival_s_Q = np.cumsum(rng.exponential(1 / rate_per_s, num))
    requests = Requests.of(arrival_s_Q, lengths(rng, num, 256), lengths(rng, num, output_tokens))
    trace = zipf_trace(len(model.moe_layers), 128, 8, num_requests=256, prompt_tokens=96, output_tokens=64)
    return Service(
        "qwen", model, load_cluster("hgx-h100"), trace, requests, EngineConfig(), fleet=Fleet(num_instances=instances)
    )  # fmt: skip


def served_s(service: Service, watched: str = "") -> float:
    """Seconds from a service to its outcome; with a progress bar of that name."""
    total = len(service.requests)
    with Progress(disable=not watched, transient=True) as progress:
        task = progress.add_task(watched, total=total)
        start = time.perf_counter()
        outcome = simulate_service(service, tell=lambda finished, now_s: progress.update(task, completed=finished))
        taken = time.perf_counter() - start
    assert np.isfinite(outcome.finish_s_Q[~outcome.dropped_Q]).all()
    return taken


def linearity() -> dict[str, tuple[float, str]]:
    """Seconds by requests, and by tokens of an answer, each over two decades, less those of a run of 5 requests."""
    by = {
        "requests": {num: qwen(num, 10.0) for num in (100, 300, 1000, 3000, 10_000)},
        "tokens": {tokens: qwen(300, 2000 / tokens, tokens) for tokens in (20, 60, 200, 600, 2000)},
    }
    start_s = min(served_s(qwen(5, 10.0)) for _ in range(3))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    figures = {}
    for axis, (name, services) in zip(axes, by.items(), strict=True):
        sizes = np.array(list(services))
        taken = np.array([min(served_s(service) for _ in range(2)) for service in services.values()]) - start_s
        exponent, offset = np.polyfit(np.log(sizes), np.log(np.maximum(taken, 1e-4)), 1)
        figures[f"serving_by_{name}_exponent"] = float(exponent), ""
        axis.loglog(sizes, taken, "o", color="C0", label="measured")
        axis.loglog(sizes, np.exp(offset) * sizes**exponent, color="C0", lw=1, label=f"slope {exponent:.2f}")
        axis.loglog(sizes, taken[-1] * sizes / sizes[-1], color="0.6", lw=1, ls="--", label="linear")
        axis.set_xlabel({"requests": "requests, of 512 tokens", "tokens": "tokens of an answer, 300 requests"}[name])
        axis.legend(frameon=False)
    axes[0].set_ylabel("seconds, without those of 5 requests")
    figure.tight_layout()
    Path("build").mkdir(exist_ok=True)
    figure.savefig("build/bench_serving.png", dpi=120)
    return figures


def day() -> dict[str, tuple[float, str]]:
    """24 hours of DeepSeek-R1's clients (ServeGen's, where they are at hand) on 40 nodes of eight H800."""
    arrivals = f'arrivals = "replayed"\nfile = "{R1_CLIENTS}"' if R1_CLIENTS.exists() else LIKE_THEM
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "day.toml"
        path.write_text(DAY.format(arrivals=arrivals))
        service = load_services(path)[0]
    return {
        "serving_day_requests": (float(len(service.requests)), ""),
        "serving_day_s": (served_s(service, "a day"), "s"),
    }


def serving() -> dict[str, tuple[float, str]]:
    """Seconds from services to outcomes; the best of three of the short ones."""
    few = qwen(300, 10.0, 154_000 / 300)
    served_s(few)  # compile
    return {
        "serving_300_requests_s": (min(served_s(few) for _ in range(3)), "s"),
        "serving_5000_requests_s": (statistics.median(served_s(qwen(5000, 10.0)) for _ in range(3)), "s"),
        "serving_8_instances_10000_requests_s": (served_s(qwen(10_000, 60.0, instances=8)), "s"),
        **linearity(),
        **day(),
    }
