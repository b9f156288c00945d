"""What is timed on a CUDA device: operators, shapes and kernels, as plain numbers; and how much work each cell is.

Operators, axes and formats are those that the cost model looks for, so that what is timed here can replace its
rooflines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.costs.work import moe_work, work
from moesim.profile.shapes import AXES, Cell

MODELS = {
    "mixtral-8x7b": (4096, 14336, 2, 8),
    "olmoe-1b-7b": (2048, 1024, 8, 64),
    "qwen3-30b-a3b": (2048, 768, 8, 128),
    "deepseek-v3": (7168, 2048, 8, 256),
}
"""Hidden size, expert width, top k and experts of published models, from their config.json."""
TOKENS = tuple(1 << n for n in range(13))
GQA = ((32, 8, 128), (32, 4, 128), (16, 16, 128))
"""Query heads, key heads and width of Mixtral-8x7B, Qwen3-30B-A3B and OLMoE."""
MLA_HEADS, MLA_KEYS, MLA_VALUES = 128, 576, 512
"""Of DeepSeek-V3 in its absorbed form."""
FP8_CAPABILITY = 89
DECODE_ROWS = 16
"""Rows per expert up to which the kernel for decode is tried."""
DISTRIBUTIONS = ("uniform", "zipf_1.2", "one_set")
"""Every expert equally likely; expert e with weight (e + 1)^-1.2; all tokens at the same top k experts."""
LIBRARY = "torch"


def cuda_cells(capability: int, has_triton: bool) -> list[Cell]:
    """The grid of a device of that compute capability; half of it has a higher rank, to be dropped first.

    Args:
        capability: such as 90; from 89 on there is fp8.
        has_triton: whether the Triton kernels are there to be timed.
    """
    cells = [Cell(0, "launch", ()), *_dense(), *_experts(), *_attention(), *_small(), *_copies()]
    return [
        cell
        for cell in cells
        if (capability >= FP8_CAPABILITY or not cell.dtype.startswith("fp8"))
        and (has_triton or not kernel_of(cell).startswith("triton"))
    ]


def kernel_of(cell: Cell) -> str:
    """What computes it: "torch", "triton" or "triton_decode"; "" where there is one way only."""
    return dict(cell.facts).get("kernel", "")


def distribution_of(cell: Cell) -> str:
    """How tokens choose experts in it."""
    return dict(cell.facts).get("distribution", "")


def _by(*kernels: str, **facts: str) -> Iterator[tuple[tuple[str, str], ...]]:
    for kernel in kernels:
        yield (*facts.items(), ("kernel", kernel))


def _dense() -> Iterator[Cell]:
    sides = [(4096, 4096), (14336, 4096), (4096, 14336), (2048, 2048), (8192, 8192)]
    for rank, dtype in ((1, "bf16"), (2, "fp8")):
        for m in (1, 16, 64, 256, 1024, 4096) if dtype == "bf16" else (16, 64, 256, 1024, 4096):
            yield from (Cell(rank, "gemm", (m, n, k), dtype=dtype, facts=(("kernel", LIBRARY),)) for n, k in sides)


def _experts() -> Iterator[Cell]:
    for name, (hidden, width, top_k, experts) in MODELS.items():
        small = name != "deepseek-v3"  # whose 256 experts leave too little room in 16 bits
        for dtype in ("bf16", "fp8_block", "int4") if small else ("fp8_block",):
            for turn, tokens in enumerate(TOKENS):
                for distribution in DISTRIBUTIONS if turn in (0, 4, 8, 12) else DISTRIBUTIONS[:1]:
                    shape = (tokens, hidden, width, top_k, experts, 1, 1)
                    kernels = ["triton"]
                    if dtype == "bf16":
                        few = tokens * top_k <= DECODE_ROWS * experts
                        kernels = [LIBRARY, "triton", *(["triton_decode"] if few else [])]
                    if tokens == 1 and distribution == "one_set":
                        continue  # as uniform
                    rank = 1 + turn % 2 + (dtype != "bf16") + 2 * (distribution != "uniform")
                    for facts in _by(*kernels, distribution=distribution):
                        yield Cell(rank, "moe", shape, dtype=dtype, facts=facts)


def _attention() -> Iterator[Cell]:
    for rank, batches in ((1, (1, 16, 64)), (2, (4, 32, 128))):
        for batch in batches:
            for length in (128, 1024, 8192):
                if batch * length > 128 * 4096:
                    continue
                for facts in _by(LIBRARY, "triton"):
                    for heads in GQA:
                        yield Cell(rank, "generation_attention", (batch, length, *heads), dtype="bf16", facts=facts)
                    yield Cell(rank, "generation_mla", (batch, length, MLA_HEADS), dtype="bf16", facts=facts)
    for batch in (1, 4):
        for length in (128, 512, 2048, 8192):
            (facts,) = _by(LIBRARY)
            for heads in GQA:
                yield Cell(batch, "context_attention", (batch, length, *heads), dtype="bf16", facts=facts)
            if batch * length <= 8192:
                yield Cell(batch, "context_mla", (batch, length, MLA_HEADS), dtype="bf16", facts=facts)


def _small() -> Iterator[Cell]:
    """Router, gather and combine."""
    for hidden, _, top_k, experts in MODELS.values():
        for tokens in (1, 64, 1024, 8192):
            for facts in _by(LIBRARY, "triton"):
                yield Cell(3, "router", (tokens, experts, top_k), dtype="fp32", facts=facts)
                for op in ("expert_gather", "expert_combine"):
                    yield Cell(3, op, (tokens, hidden, top_k, experts), dtype="bf16", facts=facts)


def _copies() -> Iterator[Cell]:
    for num_bytes in (1 << 20, 16 << 20, 256 << 20, 1 << 30):
        yield from (Cell(1, "copy", (num_bytes,), dtype="bf16", facts=facts) for facts in _by(LIBRARY, "triton"))
    for num_bytes in (64 << 10, 1 << 20, 16 << 20, 256 << 20):
        yield from (Cell(1, op, (num_bytes,), dtype="bf16") for op in AXES if op.startswith("copy_"))


@cache
def chosen_experts(tokens: int, top_k: int, experts: int, distribution: str, seed: int = 0) -> NDArray[np.int32]:
    """Expert of each choice, [T, K], no expert twice in a row; the same for the same arguments."""
    if distribution == "one_set":
        return np.tile(np.arange(top_k, dtype=np.int32), (tokens, 1))
    power = float(distribution.removeprefix("zipf_")) if distribution != "uniform" else 0.0
    # Gumbel noise on log-weights: the K largest are a draw without replacement.
    score_TE = np.random.default_rng(seed).gumbel(size=(tokens, experts)) - power * np.log(np.arange(1, experts + 1))
    return np.argsort(-score_TE, axis=1)[:, :top_k].astype(np.int32)


class Work(NamedTuple):
    """FLOP (a multiply-add is 2) and the least bytes moved."""

    flops: float
    num_bytes: float


def cell_work(cell: Cell) -> Work:
    """How much work a cell is, at the experts that its tokens really choose."""
    at = dict(zip(AXES[cell.op], (float(x) for x in cell.shape), strict=True))
    if cell.op == "moe":
        tokens, hidden, width, top_k, experts = cell.shape[:5]
        active = len(np.unique(chosen_experts(tokens, top_k, experts, distribution_of(cell))))
        flops, num_bytes = moe_work(np.array(tokens * top_k), np.array(active), hidden, width, cell.dtype)
    elif cell.op == "copy":
        return Work(0.0, 2 * at["bytes"])
    elif cell.op == "router":
        return Work(0.0, at["tokens"] * (4 * at["experts"] + 8 * at["top_k"]))
    elif cell.op == "expert_gather":
        return Work(0.0, 4 * at["tokens"] * at["top_k"] * at["hidden_size"])
    elif cell.op == "expert_combine":
        rows = at["tokens"] * (at["top_k"] + 1)
        return Work(2 * at["tokens"] * at["top_k"] * at["hidden_size"], 2 * rows * at["hidden_size"])
    else:
        flops, num_bytes = work(cell.op, cell.dtype, {name: np.array([x]) for name, x in at.items()})
    return Work(float(np.squeeze(flops)), float(np.squeeze(num_bytes)))


def without_kernel(cell: Cell) -> Cell:
    """The cell that all kernels of one operator, shape, format and load share."""
    return replace(cell, rank=0, facts=tuple(pair for pair in cell.facts if pair[0] != "kernel"))
