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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from bench_offload import offload
from bench_placement import placement as placing
from bench_serving import PEERS, serving

from moesim.estimate import estimate
from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.scenarios import load_trace
from moesim.files.traces import read_trace, write_trace
from moesim.layout import AttentionGrid, ExpertGrid, Layout
from moesim.network.fair import fair_rates
from moesim.network.routes import Fabric
from moesim.policies.placement import Contiguous
from moesim.program import iterations
from moesim.routing.counting import Counter
from moesim.routing.generator import Shape, fit_generator
from moesim.routing.synthetic import zipf_trace
from moesim.routing.trace import RoutingTrace
from moesim.scenario import Scenario
from moesim.simulate import simulate
from moesim.workload import Workload

TOKENS, ROUNDS = 128, 5
WIDE = 144


def wide_scenario(ranks: int, num_decodes: int, trace: RoutingTrace) -> Scenario:
    """DeepSeek-V3 on nodes of eight H800, spread over all ranks, 128 requests per GPU, 32 redundant experts."""
    layout = Layout(AttentionGrid(dp=ranks), ExpertGrid(ep=ranks), num_redundant_experts=32)
    workload = Workload(ranks * TOKENS, num_decodes + 1, prompt_tokens=1)
    model, cluster = load_model("deepseek-v3"), load_cluster(f"{ranks // 8} x hgx-h800")
    return Scenario("bench", model, cluster, layout, workload, trace)


@contextmanager
def token_by_token() -> Iterator[None]:
    """Runs without a prefix-summed pool."""
    kept, iterations.POOL_BYTES = iterations.POOL_BYTES, 0
    try:
        yield
    finally:
        iterations.POOL_BYTES = kept


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def two_runs_s(ranks: int, num_decodes: int, trace: RoutingTrace) -> tuple[float, float]:
    """Seconds of a short run and of one with `num_decodes` more iterations, from scenario to result."""
    few = num_decodes // 4
    short_s = seconds(lambda: estimate(wide_scenario(ranks, few, trace)))
    return short_s, seconds(lambda: estimate(wide_scenario(ranks, few + num_decodes, trace)))


def per_s(num_decodes: int, runs: list[tuple[float, float]]) -> float:
    """Iterations a second: the best of the long runs less the best of the short ones, so without set-up and prefill."""
    shorts_s, longs_s = zip(*runs, strict=True)
    return num_decodes / (min(longs_s) - min(shorts_s))


def decoding() -> dict[str, tuple[float, str]]:
    """Whole decode iterations a second, with a prefix-summed pool and token by token, in turns.

    The trace has 1,024 requests of 32 generated tokens (Zipf): 32,768 tokens, which 4,096 or 18,432 requests replay
    from different places. Iterations come back after 32; nothing is kept of an iteration but the pool. The best of
    several rounds counts, as others may use the machine.
    """
    trace = zipf_trace(58, 256, 8, num_requests=1024, prompt_tokens=1, output_tokens=32)
    figures: dict[str, tuple[float, str]] = {}
    for ranks, num_pooled, num_counted in ((32, 800, 64), (WIDE, 200, 24)):
        simulate(wide_scenario(ranks, 100, trace))  # compile
        pooled, counted = [], []
        for _ in range(ROUNDS):
            pooled.append(two_runs_s(ranks, num_pooled, trace))
            with token_by_token():
                counted.append(two_runs_s(ranks, num_counted, trace))
        rate, plain_rate = per_s(num_pooled, pooled), per_s(num_counted, counted)
        figures[f"decode_iterations_per_s_ep{ranks}"] = (rate, "iterations/s")
        figures[f"decode_tokens_per_s_ep{ranks}"] = (rate * ranks * TOKENS, "tokens/s")
        figures[f"counted_decode_iterations_per_s_ep{ranks}"] = (plain_rate, "iterations/s")
        figures[f"pool_to_counted_ratio_ep{ranks}"] = (rate / plain_rate, "")
        run_s = min(seconds(lambda r=ranks: simulate(wide_scenario(r, 1000, trace))) for _ in range(2))
        figures[f"simulate_1000_decodes_ep{ranks}_s"] = (run_s, "s")
        steps = iterations.Iterations(wide_scenario(ranks, 200, trace))
        taken = [seconds(lambda b=batch, s=steps: s.parts(b)) for batch in steps.decode_batches()]
        figures[f"pool_steps_per_s_ep{ranks}"] = (1 / statistics.median(taken), "steps/s")
    return figures


def sampling() -> dict[str, tuple[float, str]]:
    """Sampling of traces."""
    figures = {}
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
    figures.update(decoding())
    # 18,432 requests, so that every token of an iteration has a routing of its own.
    trace = zipf_trace(58, 256, 8, num_requests=WIDE * TOKENS, prompt_tokens=1, output_tokens=1)
    placement = Contiguous().place(288, WIDE, 8, np.zeros((58, 256)))
    counter = Counter(placement, 256, WIDE, (np.arange(WIDE) // 8).astype(np.int32))
    rows_B = np.random.default_rng(0).permutation(trace.num_tokens)[: WIDE * TOKENS]
    source_B = (np.arange(WIDE * TOKENS) % WIDE).astype(np.int32)
    times = [seconds(lambda: counter.count(trace.expert_ids_TLK, rows_B, source_B)) for _ in range(20)]
    figures["count_step_ep144_ms"] = (1e3 * statistics.median(times), "ms")
    figures["bench_peak_memory_gb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, "GB")
    figures.update(sampling())
    figures.update(opening())
    figures.update(fair_shares())
    figures.update(offload())
    figures.update(placing())

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
    figures.update(serving())
    write(figures)


def write(figures: dict[str, tuple[float, str]]) -> None:
    """The table on stdout and build/bench.json, written whole or not at all."""
    for name, (value, unit) in figures.items():
        print(f"{name:38s} {value:14,.2f} {unit:4s} {PEERS.get(name, '')}".rstrip())
    folder = Path("build")
    folder.mkdir(exist_ok=True)
    rows = {name: {"value": value, "unit": unit} for name, (value, unit) in figures.items()}
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        json.dump(rows, file, indent=2)
    Path(file.name).replace(folder / "bench.json")


if __name__ == "__main__":
    main()
