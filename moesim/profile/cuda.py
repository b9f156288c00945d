"""Operators on one CUDA device, bf16, timed by device events. Written without such a device: it has not been run.

Torch's own operators (matrix product, scaled dot-product attention, grouped matrix product) and, where
`moesim.kernels` has them, the Triton kernels beside them; copies to and from host memory, pinned and pageable, alone
and while another stream copies the other way; and what a launch costs.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from moesim.profile.rounds import Job, Lap
from moesim.profile.shapes import AXES, Cell

HIDDEN, WIDTH, EXPERTS, TOP_K = 4096, 1792, 64, 8
"""Of the grouped products: about the size of one rank's experts in models of today."""
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
REPEATS = 10
FLUSH_BYTES = 256 << 20
_CUDA: Any = torch.cuda


def timed_by_events(call: Callable[[], object], flushed: torch.Tensor) -> Callable[[], Lap]:
    """`REPEATS` calls, each after a write that drives the caches' contents out, by events in the stream."""

    def run() -> Lap:
        total_ms = 0.0
        for _ in range(REPEATS):
            flushed.zero_()
            start, end = _CUDA.Event(enable_timing=True), _CUDA.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            total_ms += start.elapsed_time(end)
        return Lap(total_ms * 1e-3, total_ms * 1e-3)

    return run


def cuda_jobs(seed: int) -> tuple[list[Cell], list[Job]]:
    """Cells and their jobs; both clocks of a timing are the device's.

    Raises:
        ValueError: torch finds no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    torch.manual_seed(seed)
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    calls: dict[Cell, Callable[[], Callable[[], object]]] = {Cell(0, "launch", ()): _launch}
    for rows in (1, 16, 64, 256, 1024, 4096):
        for columns, inner in ((4096, 4096), (14336, 4096), (4096, 14336)):
            calls[Cell(1, "gemm", (rows, columns, inner))] = _later(_gemm, rows, columns, inner)
    kernel = found_kernel("moesim.kernels.grouped_gemm", "experts")
    for active in (TOP_K, EXPERTS):
        for rows in (*range(1, 17), 24, 32, 48, 64, 96, 128, 256, 512):
            calls[Cell(2, "experts_torch", (active, rows))] = _later(_experts, active, rows, torch_experts)
            if kernel is not None:
                calls[Cell(2, "experts_triton", (active, rows))] = _later(_experts, active, rows, kernel)
    for batch in (1, 8, 32, 128):
        for context in (128, 1024, 4096):
            calls[Cell(1, "generation_attention", (batch, context, HEADS, KV_HEADS, HEAD_DIM))] = _later(
                _attention, batch, 1, context
            )
    for tokens in (128, 512, 2048, 8192):
        calls[Cell(1, "context_attention", (1, tokens, HEADS, KV_HEADS, HEAD_DIM))] = _later(_attention, 1, tokens, 0)
    for num_bytes in (64 << 10, 1 << 20, 16 << 20, 256 << 20):
        for op in (name for name in AXES if name.startswith("copy_")):
            calls[Cell(1, op, (num_bytes,))] = _later(_copy, op, num_bytes)
    jobs = [
        Job(cell.key, _preparing(make, flushed), parts=REPEATS, rank=cell.rank)
        for cell, make in calls.items()
    ]  # fmt: skip
    return list(calls), jobs


def found_kernel(module: str, name: str) -> Any:
    """A kernel's launcher by name, or None where this installation has none."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _later(make: Callable[..., Callable[[], object]], *given: Any) -> Callable[[], Callable[[], object]]:
    return lambda: make(*given)


def _preparing(
    make: Callable[[], Callable[[], object]], flushed: torch.Tensor
) -> Callable[[int], Callable[[], object]]:
    def prepare(_turn: int) -> Callable[[], Lap]:
        call = make()
        call()  # compiles and warms up
        torch.cuda.synchronize()
        return timed_by_events(call, flushed)

    return prepare


def _random(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.bfloat16, device="cuda")


def _launch() -> Callable[[], object]:
    small = torch.zeros(8, device="cuda")
    return lambda: small.add_(1.0)


def _gemm(rows: int, columns: int, inner: int) -> Callable[[], object]:
    left, right = _random(rows, inner), _random(columns, inner)
    return lambda: torch.nn.functional.linear(left, right)


def _experts(active: int, rows: int, run: Callable[[Any], object]) -> Callable[[], object]:
    """`rows` tokens for each of the first `active` experts, in the tensors that `moesim.kernels` takes too."""
    ids = (torch.arange(active * rows, device="cuda", dtype=torch.int32) % active).reshape(-1, TOP_K)
    inputs = SimpleNamespace(
        x_TH=_random(len(ids), HIDDEN),
        gate_up_EJH=_random(EXPERTS, 2 * WIDTH, HIDDEN),
        down_EHI=_random(EXPERTS, HIDDEN, WIDTH),
        expert_TK=ids.contiguous(),
        weight_TK=torch.full(ids.shape, 1 / TOP_K, device="cuda"),
    )
    return lambda: run(inputs)


def torch_experts(inputs: Any) -> torch.Tensor:
    """One layer's experts by torch's grouped matrix product: sort, gate and up, down, weighted sum."""
    ids_S, order_S = torch.sort(inputs.expert_TK.flatten())
    top_k = inputs.expert_TK.shape[1]
    ends_E = torch.bincount(ids_S, minlength=len(inputs.down_EHI)).cumsum(0).to(torch.int32)
    rows_SH = inputs.x_TH[order_S // top_k]
    gate_SI, up_SI = torch._grouped_mm(rows_SH, inputs.gate_up_EJH.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    out_SH = torch._grouped_mm(silu(gate_SI) * up_SI, inputs.down_EHI.transpose(1, 2), offs=ends_E)
    out_SH = out_SH * inputs.weight_TK.flatten()[order_S, None].to(out_SH.dtype)
    back_SH = torch.empty_like(out_SH)
    back_SH[order_S] = out_SH
    return back_SH.view(-1, top_k, out_SH.shape[1]).sum(dim=1)


def _attention(batch: int, tokens: int, context: int) -> Callable[[], object]:
    length = context + tokens
    query = _random(batch, HEADS, tokens, HEAD_DIM)
    key, value = (_random(batch, KV_HEADS, length, HEAD_DIM) for _ in range(2))
    return lambda: scaled_dot_product_attention(query, key, value, is_causal=tokens > 1, enable_gqa=True)


def _copy(op: str, num_bytes: int) -> Callable[[], object]:
    host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory="_pinned" in op)
    device = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    source, target = (host, device) if "to_device" in op else (device, host)
    if not op.endswith("_loaded"):
        return lambda: target.copy_(source, non_blocking=True)
    other, beside = _CUDA.Stream(), torch.empty(num_bytes * 4, dtype=torch.uint8, pin_memory=True)
    on_device = torch.empty_like(beside, device="cuda")
    load_source, load_target = (on_device, beside) if "to_device" in op else (beside, on_device)

    def loaded() -> None:
        with torch.cuda.stream(other):
            load_target.copy_(load_source, non_blocking=True)
        target.copy_(source, non_blocking=True)

    return loaded


def cuda_toml(cells: Mapping[Cell, float], facts: Mapping[str, Any]) -> str:
    """The device file: peaks and achieved fractions of what was timed."""
    properties = torch.cuda.get_device_properties(0)
    gemm = {cell: 2.0 * float(np.prod(cell.shape)) / s for cell, s in cells.items() if cell.op == "gemm"}
    grouped = {
        cell: 6.0 * float(np.prod(cell.shape)) * HIDDEN * WIDTH / s
        for cell, s in cells.items()
        if cell.op.startswith("experts")
    }
    attention = {
        cell: 4.0 * cell.shape[1] * (cell.shape[1] / 2) * HEADS * HEAD_DIM / s
        for cell, s in cells.items()
        if cell.op == "context_attention"
    }
    reading = {cell: 2.0 * cell.shape[1] * cell.shape[2] / s for cell, s in cells.items() if cell.op == "gemm"}
    peak, bandwidth = max([*gemm.values(), *grouped.values()]), max(reading.values())
    said = json.dumps(f"measured: {properties.name}, bf16, torch {facts['torch']}, device events")

    def entry(kind: str, rates: list[float], top: float) -> str:
        low, value, high = (float(x) for x in np.percentile(np.minimum(np.array(rates) / top, 1.0), (10, 50, 90)))
        return f'{kind} = {{ value = {value:.4f}, low = {low:.4f}, high = {high:.4f}, source = "measured" }}'

    return "\n".join(
        [
            f"# {properties.name}, as timed by `moesim profile run`.",
            'kind = "gpu"',
            f"launch_s = {next(s for cell, s in cells.items() if cell.op == 'launch'):.3g}",
            "power_w = 700.0",
            "[memory]",
            f"capacity_bytes = {properties.total_memory}",
            f"bytes_per_s = {bandwidth:.4g}",
            "latency_s = 7e-7",
            "[flops_per_s]",
            f"bf16 = {peak:.4g}",
            "[efficiency]",
            entry("gemm", [rate for cell, rate in gemm.items() if cell.shape[0] >= 256], peak),
            entry("grouped_gemm", [rate for cell, rate in grouped.items() if cell.shape[1] >= 64], peak),
            entry("attention", list(attention.values()), peak),
            entry("memory", [rate for cell, rate in reading.items() if cell.shape[0] == 1], bandwidth),
            'network = { value = 0.8, low = 0.6, high = 0.92, source = "assumed", note = "not timed" }',
            "[sources]",
            f"memory = {said}",
            f"flops = {said}",
            f"launch = {said}",
            'power = "assumed: not timed"',
            f"efficiency = {said}",
            "",
        ]
    )
