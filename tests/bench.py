"""`make bench`: how fast moesim is, on this machine, now. Prints a table and writes build/bench.json.

Run as a program: python tests/bench.py
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.scenarios import load_trace
from moesim.files.traces import read_trace, write_trace
from moesim.layout import AttentionGrid, ExpertGrid, Layout
from moesim.network.fair import fair_rates
from moesim.network.routes import Fabric
from moesim.policies.placement import Contiguous
from moesim.routing.counting import Counter
from moesim.routing.generator import Shape, fit_generator
from moesim.routing.pool import RoutingPool
from moesim.routing.synthetic import zipf_trace
from moesim.scenario import Scenario
from moesim.simulate import simulate
from moesim.workload import Workload

RANKS, TOKENS, ROUNDS = 144, 128, 5


def wide_scenario(output_tokens: int, trace) -> Scenario:
    """DeepSeek-V3, EP144 on 18 nodes of eight H800, 128 requests per GPU, 32 redundant experts."""
    layout = Layout(AttentionGrid(dp=RANKS), ExpertGrid(ep=RANKS), num_redundant_experts=32)
    workload = Workload(RANKS * TOKENS, output_tokens, prompt_tokens=1)
    model, cluster = load_model("deepseek-v3"), load_cluster("18 x hgx-h800")
    return Scenario("bench", model, cluster, layout, workload, trace)


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def pool_and_sampling(trace) -> dict[str, tuple[float, str]]:
    """Steps counted from a prefix-summed pool, beside counting the same tokens one by one, and sampling of traces."""
    ep, windows = 32, 64
    rng = np.random.default_rng(0)
    node_R = (np.arange(ep) // 8).astype(np.int32)
    placement = Contiguous().place(288, ep, 8, np.zeros((58, 256)))
    rows_T = rng.permutation(trace.num_tokens)[:4096]
    pool = RoutingPool(trace.expert_ids_TLK, rows_T, placement, 256, ep, node_R)
    counter = Counter(placement, 256, ep, node_R)
    first_NR, tokens_R = rng.integers(0, 4096, (windows, ep)), np.full(ep, TOKENS)
    source_B = np.repeat(np.arange(ep, dtype=np.int32), TOKENS)
    rows_NB = rows_T[(first_NR[:, :, None] + np.arange(TOKENS)) % 4096].reshape(windows, -1)
    pool_s, count_s = [], []
    for first_R, rows_B in zip(first_NR, rows_NB, strict=True):
        pool_s.append(seconds(lambda first_R=first_R: pool.count(first_R, tokens_R)))
        count_s.append(seconds(lambda rows_B=rows_B: counter.count(trace.expert_ids_TLK, rows_B, source_B)))
    figures = {
        "pool_steps_per_s_ep32": (1 / statistics.median(pool_s), "steps/s"),
        "counted_steps_per_s_ep32": (1 / statistics.median(count_s), "steps/s"),
    }
    generator = fit_generator(load_trace("olmoe-shape-16x64"))
    for name, shape in (("", None), ("_58x256", Shape(58, 256, 8))):
        rates = []
        for seed in range(ROUNDS):
            start, made = time.perf_counter(), 0
            for part in generator.sample(200, shape=shape, seed=seed):
                made += part.num_tokens * part.num_layers
            rates.append(made / (time.perf_counter() - start))
        figures[f"sampled_token_layers_per_s{name}"] = (statistics.median(rates), "token-layers/s")
    return figures


def opening() -> dict[str, tuple[float, str]]:
    """A trace of 10 million token-layers (172,414 tokens x 58 layers, top 8), opened and checked in full."""
    trace = zipf_trace(58, 256, 8, num_requests=172_414, prompt_tokens=1, output_tokens=0)
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("arrow", "parquet"):
            path = Path(folder) / f"trace.{suffix}"
            write_trace(trace, path)
            read_trace(path)  # compile; and the file lies in the page cache
            figures[f"open_10m_token_layers_{suffix}_s"] = (
                statistics.median(seconds(lambda path=path: read_trace(path)) for _ in range(ROUNDS)), "s",
            )  # fmt: skip
            figures[f"size_10m_token_layers_{suffix}_mb"] = (path.stat().st_size / 1e6, "MB")
    return figures


def fair_shares() -> dict[str, tuple[float, str]]:
    """Max-min fair rates of a flow between each two ranks of a switch of 72, and of a fat tree of 256 NICs."""
    figures = {}
    for key, machine in (("nvl72", "gb200-nvl72"), ("fat_tree_256", "32 x hgx-h100")):
        fabric = Fabric(load_cluster(machine))
        ends = np.argwhere(~np.eye(fabric.cluster.num_ranks, dtype=bool))
        routes = fabric.routes(ends[:, 0], ends[:, 1])
        fair_rates(routes, fabric.bytes_per_s_K)  # compile
        taken = [seconds(lambda r=routes, f=fabric: fair_rates(r, f.bytes_per_s_K)) for _ in range(20)]
        figures[f"max_min_{key}_ms"] = (1e3 * statistics.median(taken), "ms")
    return figures


def main() -> None:
    """Measure, print, write."""
    figures: dict[str, tuple[float, str]] = {}
    # A pool of 18,432 requests, so that every token of an iteration has a routing of its own.
    trace = zipf_trace(58, 256, 8, num_requests=RANKS * TOKENS, prompt_tokens=1, output_tokens=1)
    simulate(wide_scenario(2, trace))  # compile
    short, long = 3, 33
    rates = []
    for _ in range(ROUNDS):  # the difference of two runs leaves set-up and prefill out
        extra_s = seconds(lambda: simulate(wide_scenario(long, trace))) - seconds(
            lambda: simulate(wide_scenario(short, trace))
        )
        rates.append((long - short) / extra_s)
    figures["decode_iterations_per_s_ep144"] = (statistics.median(rates), "iterations/s")
    figures["decode_tokens_per_s_ep144"] = (statistics.median(rates) * RANKS * TOKENS, "tokens/s")

    counter = Counter(
        Contiguous().place(288, RANKS, 8, np.zeros((58, 256))), 256, RANKS, (np.arange(RANKS) // 8).astype(np.int32)
    )
    rows_B = np.random.default_rng(0).permutation(trace.num_tokens)[: RANKS * TOKENS]
    source_B = (np.arange(RANKS * TOKENS) % RANKS).astype(np.int32)
    times = [seconds(lambda: counter.count(trace.expert_ids_TLK, rows_B, source_B)) for _ in range(20)]
    figures["count_step_ep144_ms"] = (1e3 * statistics.median(times), "ms")
    figures["bench_peak_memory_gb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, "GB")
    figures.update(pool_and_sampling(trace))
    figures.update(opening())
    figures.update(fair_shares())

    python = [sys.executable, "-c"]
    empty = statistics.median(seconds(lambda: subprocess.run([*python, ""], check=True)) for _ in range(ROUNDS))
    imported = statistics.median(
        seconds(lambda: subprocess.run([*python, "import moesim"], check=True)) for _ in range(ROUNDS)
    )
    figures["import_moesim_s"] = (imported, "s")
    figures["bare_python_s"] = (empty, "s")
    check = [sys.executable, "-m", "moesim", "check", str(Path(__file__).parents[1] / "studies" / "quickstart.toml")]
    started = statistics.median(
        seconds(lambda: subprocess.run(check, check=True, capture_output=True)) for _ in range(ROUNDS)
    )
    figures["start_of_a_run_s"] = (started, "s")
    write(figures)


def write(figures: dict[str, tuple[float, str]]) -> None:
    """The table on stdout and build/bench.json, written whole or not at all."""
    for name, (value, unit) in figures.items():
        print(f"{name:34s} {value:14,.2f} {unit}")
    folder = Path("build")
    folder.mkdir(exist_ok=True)
    rows = {name: {"value": value, "unit": unit} for name, (value, unit) in figures.items()}
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        json.dump(rows, file, indent=2)
    Path(file.name).replace(folder / "bench.json")


if __name__ == "__main__":
    main()
