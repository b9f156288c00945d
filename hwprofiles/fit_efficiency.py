"""Fits the `[efficiency]` of a device to measured kernel tables, and prints the lines for its TOML file.

    python fit_efficiency.py DATA_DIR

DATA_DIR holds NVIDIA aiconfigurator's tables (Apache-2.0) as SYSTEM/FAMILY/BACKEND/VERSION/TABLE.parquet, latencies
in milliseconds. An efficiency is what a roofline lacks, so only rows far inside one side of the roofline count: large
shapes for compute, weights far larger than a cache for memory, large messages for the network. The value is the
median over rows of achieved over peak, low and high are its 5th and 95th percentiles.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moesim.files.hardware import load_cluster
from moesim.hardware import Cluster

SYSTEMS = {"a100_sxm": "dgx-a100", "h100_sxm": "hgx-h100", "h200_sxm": "hgx-h200", "b200_sxm": "hgx-b200"}
FORMATS = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8"}
UNSOUND = ("b200_sxm/attention/sglang",)
"""Tables left out: most of their long prefills are faster than the peak of the device."""
GEMM_SHAPE = ("gemm_dtype", "m", "n", "k")


def read(directory: Path, family: str, table: str, shape: tuple[str, ...]) -> pa.Table:
    """The table's fastest row for each shape over back ends and kernels (attention without a window)."""
    found = sorted(directory.glob(f"{family}/*/*/{table}.parquet"))
    found = [path for path in found if not any(folder in path.as_posix() for folder in UNSOUND)]
    if not found:
        raise ValueError(f"{directory}: no {family}/*/*/{table}.parquet; give the folder that holds the systems")
    parts = [pq.read_table(path) for path in found]
    parts = [
        part.filter(pc.field("window_size") == 0) if "window_size" in part.column_names else part for part in parts
    ]
    whole = [part for part in parts if {*shape} <= {*part.column_names}]
    rows = pa.concat_tables([part.select([*shape, "latency"]) for part in whole], promote_options="permissive")
    best = rows.group_by(list(shape)).aggregate([("latency", "min")])
    return best.rename_columns([name.removesuffix("_min") for name in best.column_names])


def column(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A numeric column."""
    return np.asarray(table[name].to_numpy(), dtype=np.float64)


def peaks(cluster: Cluster, formats: list[str]) -> NDArray[np.float64]:
    """Peak of each row's format; NaN where it has none, so that the row drops out."""
    flops = cluster.device.flops_per_s
    return np.array([flops.get(FORMATS.get(name, ""), np.nan) for name in formats])


def gemm(directory: Path, cluster: Cluster) -> tuple[NDArray[np.float64], str]:
    """Every side is at least 2048."""
    table = read(directory, "gemm", "gemm_perf", GEMM_SHAPE)
    m, n, k = (column(table, name) for name in "mnk")
    ratio = 2 * m * n * k / (column(table, "latency") * 1e-3) / peaks(cluster, table["gemm_dtype"].to_pylist())
    return ratio[np.minimum(np.minimum(m, n), k) >= 2048], "bf16 and fp8 GEMMs with all sides >= 2048"


def grouped_gemm(directory: Path, cluster: Cluster) -> tuple[NDArray[np.float64], str]:
    """Three matrices per expert, evenly loaded, at least 256 tokens for each expert, on one GPU."""
    names = "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"
    table = read(directory, "moe", "moe_perf", (*names, "moe_dtype", "distribution"))
    tokens, hidden, inter, top_k, experts, tp, ep = (column(table, name) for name in names)
    flop = 6 * tokens * top_k * hidden * inter / tp
    ratio = flop / (column(table, "latency") * 1e-3) / peaks(cluster, table["moe_dtype"].to_pylist())
    even = np.array(table["distribution"].to_pylist()) == "balanced"
    keep = even & (ep == 1) & (tokens * top_k / experts >= 256) & (hidden >= 2048) & (inter / tp >= 512)
    return ratio[keep], "bf16 and fp8 MoE layers on one GPU, balanced, >= 256 tokens per expert"


def attention(directory: Path, cluster: Cluster) -> tuple[NDArray[np.float64], str]:
    """Causal prefill of at least 4096 tokens, in bf16, without a window."""
    names = "batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim"
    table = read(directory, "attention", "context_attention_perf", (*names, "attn_dtype"))
    batch, length, heads, _, dim = (column(table, name) for name in names)
    flop = 2 * batch * length**2 * heads * dim
    ratio = flop / (column(table, "latency") * 1e-3) / cluster.device.flops_per_s["bf16"]
    plain = np.array(table["attn_dtype"].to_pylist()) == "bfloat16"
    keep = plain & (length >= 4096) & (heads * batch >= 32) & (dim == 128)
    return ratio[keep], "causal bf16 prefill of >= 4096 tokens, head_dim 128"


def memory(directory: Path, cluster: Cluster) -> tuple[NDArray[np.float64], str]:
    """GEMMs of at most 16 rows whose weights are at least 256 MB."""
    table = read(directory, "gemm", "gemm_perf", GEMM_SHAPE)
    m, n, k = (column(table, name) for name in "mnk")
    width = np.array([{"bfloat16": 2.0, "fp8": 1.0}.get(name, np.nan) for name in table["gemm_dtype"].to_pylist()])
    ratio = width * n * k / (column(table, "latency") * 1e-3) / cluster.device.memory.bytes_per_s
    return ratio[(m <= 16) & (width * n * k >= 256e6)], "bf16 and fp8 GEMMs of <= 16 rows with >= 256 MB of weights"


def network(directory: Path, cluster: Cluster) -> tuple[NDArray[np.float64], str]:
    """Bus bandwidth of NCCL over all eight GPUs, 64 MB and more; all-reduce is left out: switches may add up."""
    found = sorted(directory.glob("comm/nccl/*/nccl_perf.parquet"))
    table = pq.read_table(found[-1])
    size, gpus = 2 * column(table, "message_size"), column(table, "num_gpus")
    ratio = (gpus - 1) / gpus * size / (column(table, "latency") * 1e-3) / cluster.scale_up.bytes_per_s
    kind = np.isin(table["op_name"].to_pylist(), ["all_gather", "reduce_scatter", "alltoall"])
    half = np.array(table["nccl_dtype"].to_pylist()) == "half"
    rows = "NCCL all-gather, reduce-scatter, all-to-all of >= 64 MB over eight GPUs, bus bandwidth"
    return ratio[kind & half & (gpus == 8) & (size >= 64e6)], rows


def main(data: Path) -> None:
    """Print the fitted lines of every system."""
    for system, name in SYSTEMS.items():
        cluster = load_cluster(name)
        print(f"# {cluster.device.name}")
        for fit in (gemm, grouped_gemm, attention, memory, network):
            ratio, rows = fit(data / system, cluster)
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
