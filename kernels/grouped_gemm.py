"""Grouped GEMM of the experts in 16 or 32 bits: gate and up product with SwiGLU, then the down product.

Rows are sorted by expert and padded (`moesim.kernels.permute`), so one block of rows meets one expert's weights.
The first product can gather its rows from the token rows itself, which saves writing and reading the permuted copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moesim.kernels.expert_shapes import CASES, ExpertsInputs, candidate_tiles, flops, num_bytes, reference
from moesim.kernels.permute import ExpertRows, combine, permute
from moesim.kernels.tiles import UPCAST, Tile, capability, ceil_div, check_contiguous

__all__ = ["CASES", "experts", "flops", "grouped_gemm", "num_bytes", "reference"]


@triton.jit
def tile_of(tile, num_row_blocks, num_column_blocks, GROUP_M: tl.constexpr):
    """Block of rows and of columns of a tile: GROUP_M row blocks share their columns' weights in L2."""
    per_group = GROUP_M * num_column_blocks
    first = (tile // per_group) * GROUP_M
    height = tl.minimum(num_row_blocks - first, GROUP_M)
    within = tile % per_group
    return first + within % height, within // height


@triton.jit
def load_k(ptr, k, K, mask, EVEN_K: tl.constexpr, MASKED: tl.constexpr, AXIS: tl.constexpr):
    """One block along K of an operand; columns beyond K, and what `mask` excludes, are zero."""
    inside = tl.expand_dims(k < K, AXIS)
    if EVEN_K and MASKED:
        value = tl.load(ptr, mask=mask, other=0.0)
    elif EVEN_K:
        value = tl.load(ptr)
    elif MASKED:
        value = tl.load(ptr, mask=mask & inside, other=0.0)
    else:
        value = tl.load(ptr, mask=inside, other=0.0)
    return value


@triton.jit
def product(a, b, acc, UPCAST: tl.constexpr):
    """acc + a @ b in fp32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def grouped_gemm_kernel(
    x_ptr, w_ptr, y_ptr, slot_ptr, expert_ptr, used_ptr, S, N, K,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SWIGLU: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """y[p] = x[p] @ w[expert of p]^T, or silu(gate) * up of its two halves. x [., K], w [E, N or 2N, K], y [P, N]."""
    num_row_blocks = tl.load(used_ptr)
    num_column_blocks = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), num_row_blocks * num_column_blocks, tl.num_programs(0)):
        block, column_block = tile_of(tile, num_row_blocks, num_column_blocks, GROUP_M)
        expert = tl.load(expert_ptr + block).to(tl.int64)
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        if GATHER:
            slot = tl.load(slot_ptr + row)
            source = (slot // TOP_K).to(tl.int64)
            real = (slot < S)[:, None]
        else:
            source = row.to(tl.int64)
            real = (row >= 0)[:, None]
        wide = (column < N)[None, :]
        a_ptr = x_ptr + source[:, None] * K + k[None, :]
        w_base = w_ptr + expert * (N * K * (2 if SWIGLU else 1)).to(tl.int64)
        b_ptr = w_base + column.to(tl.int64)[None, :] * K + k[:, None]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if SWIGLU:
            acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up_offset = N.to(tl.int64) * K
        for start in range(0, K, BLOCK_K):
            a = load_k(a_ptr + start, start + k, K, real, EVEN_K, GATHER, 0)
            b = load_k(b_ptr + start, start + k, K, wide, EVEN_K, not EVEN_N, 1)
            acc = product(a, b, acc, UPCAST)
            if SWIGLU:
                b_up = load_k(b_ptr + up_offset + start, start + k, K, wide, EVEN_K, not EVEN_N, 1)
                acc_up = product(a, b_up, acc_up, UPCAST)
        if SWIGLU:
            acc = acc * tl.sigmoid(acc) * acc_up
        y = y_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=wide)


def grouped_gemm(
    x_RK: torch.Tensor,
    w_ENK: torch.Tensor,
    rows: ExpertRows,
    tile: Tile,
    *,
    gather: bool,
    swiglu: bool,
    y_PN: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each padded row times its expert's matrix, [P, N]; rows of unused blocks are left as they were.

    Args:
        x_RK: token rows when `gather`, else padded rows (padding may hold anything finite).
        w_ENK: [E, N, K]; with `swiglu` [E, 2N, K], gate rows first.
        rows: where slots went; `tile.block_m` must be its `block_m`.
    """
    K, P = x_RK.shape[1], rows.slot_P.numel()
    N = w_ENK.shape[1] // (2 if swiglu else 1)
    if w_ENK.shape[2] != K:
        raise ValueError(f"rows have {K} columns, the experts' matrices {w_ENK.shape[2]}; they must be equal")
    if tile.block_m != rows.block_m:
        raise ValueError(f"tile.block_m is {tile.block_m}, but rows were padded to {rows.block_m}; use the same")
    if y_PN is None:
        y_PN = x_RK.new_empty(P, N)
    check_contiguous(x_RK=x_RK, w_ENK=w_ENK, y_PN=y_PN)
    num_tiles = rows.expert_B.numel() * ceil_div(N, tile.block_n)
    if num_tiles:
        grouped_gemm_kernel[(tile.programs(num_tiles, x_RK.device),)](
            x_RK, w_ENK, y_PN, rows.slot_P, rows.expert_B, rows.used, rows.row_TK.numel(), N, K,
            TOP_K=rows.row_TK.shape[1], GATHER=gather, SWIGLU=swiglu,
            EVEN_N=N % tile.block_n == 0, EVEN_K=K % tile.block_k == 0,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            UPCAST=UPCAST, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y_PN


def experts(inputs: ExpertsInputs, tile: Tile | None = None) -> torch.Tensor:
    """One layer's routed experts, [T, H]: permute, gate/up with SwiGLU, down, weighted combine."""
    num_experts = inputs.gate_up_EJH.shape[0]
    tile = tile or candidate_tiles(inputs.expert_TK.numel() / num_experts, capability(inputs.x_TH.device))[0]
    rows = permute(inputs.expert_TK, num_experts, tile.block_m)
    gated_PI = grouped_gemm(inputs.x_TH, inputs.gate_up_EJH, rows, tile, gather=True, swiglu=True)
    y_PH = grouped_gemm(gated_PI, inputs.down_EHI, rows, tile, gather=False, swiglu=False)
    return combine(y_PH, rows, inputs.weight_TK)
