"""Experts for few tokens each: the time is that of reading the weights, so programs stream them.

One program per block of rows, tile of columns and share of K. Weights are the left operand, so that the long side of
the matrix unit's tile runs along their rows and the few tokens along its short side. The down product can split K into
partial sums, which the combine adds: enough programs to fill a GPU when one token chose its few experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moesim.kernels.expert_shapes import CASES, ExpertsInputs, flops, num_bytes, reference
from moesim.kernels.grouped_gemm import load_k, product
from moesim.kernels.permute import ExpertRows, combine, permute
from moesim.kernels.tiles import UPCAST, Tile, ceil_div, check_contiguous

__all__ = ["CASES", "experts", "flops", "num_bytes", "reference", "stream_weights"]

#: Default and candidates; none has been timed.
TILES = (Tile(16, 64, 128, 1, 4, 4), Tile(16, 32, 256, 1, 4, 3), Tile(16, 128, 64, 1, 4, 4), Tile(16, 64, 256, 1, 8, 3))


@triton.jit
def stream_weights_kernel(
    x_ptr, w_ptr, y_ptr, slot_ptr, expert_ptr, S, N, K, k_per_split, split_stride,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SWIGLU: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y[split, p] = x[p] @ w[expert of p]^T over one share of K; the tile in registers is transposed."""
    # Column tiles run fastest: neighbours in time read neighbouring weights and the same few rows.
    column_block, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(expert_ptr + block).to(tl.int64)
    if expert >= 0:
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        slot = tl.load(slot_ptr + row)
        real = (slot < S)[None, :]
        source = (slot // TOP_K if GATHER else row).to(tl.int64)
        wide = (column < N)[:, None]
        halves: tl.constexpr = 2 if SWIGLU else 1
        x = x_ptr + source[None, :] * K + k[:, None]
        w = w_ptr + expert * halves * N * K + column.to(tl.int64)[:, None] * K + k[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if SWIGLU:
            acc_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        first = split * k_per_split
        for start in range(first, tl.minimum(first + k_per_split, K), BLOCK_K):
            few = load_k(x + start, start + k, K, real, EVEN_K, True, 1)
            acc = product(load_k(w + start, start + k, K, wide, EVEN_K, not EVEN_N, 0), few, acc, UPCAST)
            if SWIGLU:
                up = load_k(w + N.to(tl.int64) * K + start, start + k, K, wide, EVEN_K, not EVEN_N, 0)
                acc_up = product(up, few, acc_up, UPCAST)
        if SWIGLU:
            acc = acc * tl.sigmoid(acc) * acc_up
        y = y_ptr + split * split_stride + row.to(tl.int64)[None, :] * N + column[:, None]
        tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=wide & real)


def stream_weights(
    x_RK: torch.Tensor, w_ENK: torch.Tensor, rows: ExpertRows, tile: Tile, *, swiglu: bool, num_splits: int = 1
) -> torch.Tensor:
    """With `swiglu`: token rows through gate and up, [P, N]; without: padded rows, fp32 partial sums [splits, P, N].

    Only rows that belong to a slot are written.
    """
    K, P, N = x_RK.shape[1], rows.slot_P.numel(), w_ENK.shape[1] // (2 if swiglu else 1)
    if w_ENK.shape[2] != K:
        raise ValueError(f"rows have {K} columns, the experts' matrices {w_ENK.shape[2]}; they must be equal")
    if tile.block_m != rows.block_m:
        raise ValueError(f"tile.block_m is {tile.block_m}, but rows were padded to {rows.block_m}; use the same")
    if swiglu and num_splits != 1:
        raise ValueError(f"SwiGLU needs whole sums: num_splits must be 1, given {num_splits}")
    check_contiguous(x_RK=x_RK, w_ENK=w_ENK)
    k_per_split = ceil_div(ceil_div(K, num_splits), tile.block_k) * tile.block_k
    num_splits = max(1, ceil_div(K, k_per_split))
    y = x_RK.new_empty(P, N) if swiglu else x_RK.new_empty(num_splits, P, N, dtype=torch.float32)
    if P:
        stream_weights_kernel[(ceil_div(N, tile.block_n), rows.expert_B.numel(), num_splits)](
            x_RK, w_ENK, y, rows.slot_P, rows.expert_B, rows.row_TK.numel(), N, K, k_per_split, P * N,
            TOP_K=rows.row_TK.shape[1], GATHER=swiglu, SWIGLU=swiglu,
            EVEN_N=N % tile.block_n == 0, EVEN_K=K % tile.block_k == 0,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, UPCAST=UPCAST,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y


def experts(inputs: ExpertsInputs, tile: Tile = TILES[0], num_splits: int = 2) -> torch.Tensor:
    """One layer's routed experts, [T, H] in x's dtype; right for any load, meant for few tokens per expert."""
    rows = permute(inputs.expert_TK, inputs.gate_up_EJH.shape[0], tile.block_m)
    gated_PI = stream_weights(inputs.x_TH, inputs.gate_up_EJH, rows, tile, swiglu=True)
    y_SPH = stream_weights(gated_PI, inputs.down_EHI, rows, tile, swiglu=False, num_splits=num_splits)
    return combine(y_SPH, rows, inputs.weight_TK, torch.empty_like(inputs.x_TH))
