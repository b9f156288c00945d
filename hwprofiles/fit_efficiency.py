"""Fits the `[efficiency]` of a device to measured kernel tables, and prints the lines for its TOML file.

    python fit_efficiency.py DATA_DIR

DATA_DIR holds NVIDIA aiconfigurator's tables (Apache-2.0), as `moesim profile import` takes them. An efficiency is what
a roofline lacks, so only rows far inside one side of the roofline count: large shapes for compute, weights far larger
than a cache for memory, large messages for the network. The value is the median over rows of achieved over peak, low
and high are its 5th and 95th percentiles.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.costs.measured import MeasuredTable
from moesim.costs.work import Coordinates, weight_bytes, work
from moesim.files.hardware import load_cluster
from moesim.files.profiles import tables_of_device
from moesim.hardware import Cluster

SYSTEMS = {"a100_sxm": "dgx-a100", "h100_sxm": "hgx-h100", "h200_sxm": "hgx-h200", "b200_sxm": "hgx-b200"}
PEAKS = {"bf16": "bf16", "fp8": "fp8", "fp8_block": "fp8"}
"""Formats of the tables that count -> whose peak they are held against."""
Floats = NDArray[np.float64]


def fastest(
    tables: Sequence[MeasuredTable], op: str, dtypes: Sequence[str], **facts: str
) -> Iterator[tuple[str, Coordinates, Floats]]:
    """For each format: coordinates of an operator's points, and their seconds on the fastest back end and kernel."""
    for dtype in dtypes:
        found = [t for t in tables if (t.op, t.dtype) == (op, dtype) and facts.items() <= dict(t.facts).items()]
        if found:
            points_ND, which = np.unique(np.concatenate([t.points_ND for t in found]), axis=0, return_inverse=True)
            best_N = np.full(len(points_ND), np.inf)
            np.minimum.at(best_N, which.ravel(), np.concatenate([t.seconds_N for t in found]))
            yield dtype, dict(zip(found[0].axes, points_ND.T, strict=True)), best_N


def gemm(tables: Sequence[MeasuredTable], cluster: Cluster) -> tuple[Floats, str]:
    """Every side is at least 2048."""
    ratios = []
    for dtype, x, seconds_N in fastest(tables, "gemm", tuple(PEAKS)):
        ratio = work("gemm", dtype, x)[0] / seconds_N / cluster.device.flops_per_s.get(PEAKS[dtype], np.nan)
        ratios.append(ratio[np.minimum(np.minimum(x["m"], x["n"]), x["k"]) >= 2048])
    return np.concatenate(ratios), "bf16 and fp8 GEMMs with all sides >= 2048"


def grouped_gemm(tables: Sequence[MeasuredTable], cluster: Cluster) -> tuple[Floats, str]:
    """Three matrices per expert, evenly loaded, at least 256 tokens for each expert, on one GPU."""
    ratios = []
    for dtype, x, seconds_N in fastest(tables, "moe", tuple(PEAKS), distribution="balanced"):
        ratio = work("moe", dtype, x)[0] / seconds_N / cluster.device.flops_per_s.get(PEAKS[dtype], np.nan)
        busy = (x["ep"] == 1) & (x["num_tokens"] * x["top_k"] / x["num_experts"] >= 256)
        ratios.append(ratio[busy & (x["hidden_size"] >= 2048) & (x["inter_size"] / x["tp"] >= 512)])
    return np.concatenate(ratios), "bf16 and fp8 MoE layers on one GPU, balanced, >= 256 tokens per expert"


def attention(tables: Sequence[MeasuredTable], cluster: Cluster) -> tuple[Floats, str]:
    """Causal prefill of at least 4096 tokens, in bf16, without a window."""
    ((_, x, seconds_N),) = fastest(tables, "context_attention", ("bf16",), window="0")
    ratio = work("context_attention", "bf16", x)[0] / seconds_N / cluster.device.flops_per_s["bf16"]
    keep = (x["seq_len"] >= 4096) & (x["num_heads"] * x["batch_size"] >= 32) & (x["head_dim"] == 128)
    return ratio[keep], "causal bf16 prefill of >= 4096 tokens, head_dim 128"


def memory(tables: Sequence[MeasuredTable], cluster: Cluster) -> tuple[Floats, str]:
    """GEMMs of at most 16 rows whose weights are at least 256 MB."""
    ratios = []
    for dtype, x, seconds_N in fastest(tables, "gemm", ("bf16", "fp8")):
        num_bytes = weight_bytes(dtype) * x["n"] * x["k"]
        ratio = num_bytes / seconds_N / cluster.device.memory.bytes_per_s
        ratios.append(ratio[(x["m"] <= 16) & (num_bytes >= 256e6)])
    return np.concatenate(ratios), "bf16 and fp8 GEMMs of <= 16 rows with >= 256 MB of weights"


def network(tables: Sequence[MeasuredTable], cluster: Cluster) -> tuple[Floats, str]:
    """Bus bandwidth of NCCL over all eight GPUs, 64 MB and more; all-reduce is left out: switches may add up."""
    ratios = []
    for op in ("all_gather", "reduce_scatter", "all_to_all"):
        for dtype, x, seconds_N in fastest(tables, op, ("fp16",), backend="nccl"):
            ratio = work(op, dtype, x)[1] / seconds_N / cluster.scale_up.bytes_per_s
            ratios.append(ratio[(x["num_gpus"] == 8) & (x["message_bytes"] >= 64e6)])
    rows = "NCCL all-gather, reduce-scatter, all-to-all of >= 64 MB over eight GPUs, bus bandwidth"
    return np.concatenate(ratios), rows


def main(data: Path) -> None:
    """Print the fitted lines of every system."""
    for system, name in SYSTEMS.items():
        cluster, tables = load_cluster(name), tables_of_device(data, system).tables
        print(f"# {cluster.device.name}")
        for fit in (gemm, grouped_gemm, attention, memory, network):
            ratio, rows = fit(tables, cluster)
            ratio = ratio[np.isfinite(ratio)]
            if ratio.size == 0:
                print(f"# {fit.__name__}: no rows")
                continue
            low, value, high = np.percentile(ratio, [5, 50, 95])
            note = f"median, p5 and p95 of {ratio.size} rows of aiconfigurator: {rows}"
            print(
                f"{fit.__name__} = {{ value = {value:.2f}, low = {low:.2f}, high = {high:.2f}, "
                f'source = "fitted", note = "{note}" }}'
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
