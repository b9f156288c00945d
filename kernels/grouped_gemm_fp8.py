"""Grouped GEMM of the experts in fp8 (e4m3) with block scales, as DeepSeek-V3 stores its weights.

Weights have one fp32 scale for each 128 x 128 block, activations one for each row and 128 columns. Products of one
128-wide block of K are summed by the matrix unit, scaled, and added in fp32. The gate/up product quantises its own
output, so the down product reads fp8 rows. Needs compute capability 8.9 or later.

Source: DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from moesim.kernels.expert_shapes import CASES, ExpertsInputs, ExpertsShape, flops, num_bytes
from moesim.kernels.grouped_gemm import load_k, tile_of
from moesim.kernels.permute import ExpertRows, combine, permute
from moesim.kernels.tiles import UPCAST, Tile, ceil_div, check_contiguous

__all__ = ["CASES", "experts", "flops", "grouped_gemm_fp8", "num_bytes", "weight_bytes_per_param"]

#: Side of a weight block and width of an activation group.
GROUP = 128
#: Largest finite e4m3 value.
FP8_MAX = 448.0
#: Default and candidates: block_k must be GROUP, and block_n of the gate/up product too, to quantise whole groups.
TILES = (Tile(64, 128, 128, 8, 8, 3), Tile(32, 128, 128, 8, 4, 3), Tile(16, 128, 128, 1, 4, 3))


@triton.jit
def quantise(value, FP8_MAX: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of one group to (value / scale, scale), scale = largest magnitude / FP8_MAX."""
    scale = tl.maximum(tl.max(tl.abs(value), axis=1), 1e-10) / FP8_MAX
    value = value / scale[:, None]
    if UPCAST:
        # The interpreter's conversion loses the carry into the exponent (31.9 becomes 16): round to 4 bits before.
        wide = value * 1048577.0
        value = wide - (wide - value)
    return value, scale


@triton.jit
def quantise_kernel(
    x_ptr, q_ptr, scale_ptr, R, K, FP8_MAX: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr
):
    """One group of columns of some rows of x to fp8 and scales."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    column = group * GROUP + tl.arange(0, GROUP)
    inside = (row < R)[:, None] & (column < K)[None, :]
    at = row[:, None] * K + column[None, :]
    value, scale = quantise(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), FP8_MAX, UPCAST)
    tl.store(q_ptr + at, value.to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row * tl.num_programs(1) + group, scale, mask=row < R)


@triton.jit
def product_fp8(a, b, UPCAST: tl.constexpr):
    """a @ b in fp32; the matrix unit holds all 128 products of a block before they are scaled."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b)


@triton.jit
def grouped_gemm_fp8_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, y_ptr, y_scale_ptr, slot_ptr, expert_ptr, used_ptr, S, N, K,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SWIGLU: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, GROUP_M: tl.constexpr,
    FP8_MAX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """As grouped_gemm_kernel, with scales; with SWIGLU, y is fp8 and its scales go to y_scale [P, N / GROUP]."""
    num_row_blocks = tl.load(used_ptr)
    num_column_blocks = tl.cdiv(N, BLOCK_N)
    groups_k, groups_n = tl.cdiv(K, GROUP), tl.cdiv(N, GROUP)
    halves: tl.constexpr = 2 if SWIGLU else 1
    for tile in range(tl.program_id(0), num_row_blocks * num_column_blocks, tl.num_programs(0)):
        block, column_block = tile_of(tile, num_row_blocks, num_column_blocks, GROUP_M)
        expert = tl.load(expert_ptr + block).to(tl.int64)
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, GROUP)
        if GATHER:
            slot = tl.load(slot_ptr + row)
            source = (slot // TOP_K).to(tl.int64)
            real = slot < S
        else:
            source = row.to(tl.int64)
            real = row >= 0
        wide = (column < N)[None, :]
        a_ptr = x_ptr + source[:, None] * K + k[None, :]
        b_ptr = w_ptr + expert * halves * N * K + column.to(tl.int64)[None, :] * K + k[:, None]
        # BLOCK_N divides GROUP, so one scale holds for the whole tile of weights.
        scale_ptr = w_scale_ptr + (expert * halves * groups_n + (column_block * BLOCK_N) // GROUP) * groups_k
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if SWIGLU:
            acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(0, groups_k):
            start = step * GROUP
            a = load_k(a_ptr + start, start + k, K, real[:, None], EVEN_K, GATHER, 0)
            a_scale = tl.load(x_scale_ptr + source * groups_k + step, mask=real, other=0.0)
            b = load_k(b_ptr + start, start + k, K, wide, EVEN_K, not EVEN_N, 1)
            acc += product_fp8(a, b, UPCAST) * (a_scale * tl.load(scale_ptr + step))[:, None]
            if SWIGLU:
                b_up = load_k(b_ptr + N.to(tl.int64) * K + start, start + k, K, wide, EVEN_K, not EVEN_N, 1)
                up_scale = tl.load(scale_ptr + groups_n * groups_k + step)
                acc_up += product_fp8(a, b_up, UPCAST) * (a_scale * up_scale)[:, None]
        y = y_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
        if SWIGLU:
            value, scale = quantise(tl.where(wide, acc * tl.sigmoid(acc) * acc_up, 0.0), FP8_MAX, UPCAST)
            tl.store(y, value.to(y_ptr.dtype.element_ty), mask=wide)
            tl.store(y_scale_ptr + row.to(tl.int64) * groups_n + column_block, scale)
        else:
            tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=wide)


@dataclass(frozen=True)
class Fp8Inputs:
    """One layer's tensors; scales are fp32. J = 2 x width, gate rows first, and its blocks' scales likewise."""

    x_TH: torch.Tensor
    gate_up_EJH: torch.Tensor
    gate_up_scale: torch.Tensor  # [E, 2 x ceil(I / 128), ceil(H / 128)]
    down_EHI: torch.Tensor
    down_scale: torch.Tensor  # [E, ceil(H / 128), ceil(I / 128)]
    expert_TK: torch.Tensor
    weight_TK: torch.Tensor


def quantise_rows(x_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as fp8 [R, K] with scales [R, ceil(K / 128)]."""
    check_contiguous(x_RK=x_RK)
    R, K = x_RK.shape
    q_RK = torch.empty((R, K), dtype=torch.float8_e4m3fn, device=x_RK.device)
    scale = torch.empty((R, ceil_div(K, GROUP)), dtype=torch.float32, device=x_RK.device)
    if R:
        quantise_kernel[(ceil_div(R, 16), scale.shape[1])](
            x_RK, q_RK, scale, R, K, FP8_MAX=FP8_MAX, UPCAST=UPCAST, ROWS=16, GROUP=GROUP
        )
    return q_RK, scale


def quantise_weights(w_ENK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices as fp8 with one scale for each 128 x 128 block [E, ceil(N / 128), ceil(K / 128)], in torch."""
    N, K = w_ENK.shape[1:]
    padded = torch.nn.functional.pad(w_ENK.float(), (0, -K % GROUP, 0, -N % GROUP))
    blocks = padded.unflatten(2, (-1, GROUP)).unflatten(1, (-1, GROUP))
    scale = blocks.abs().amax(dim=(2, 4)).clamp(min=1e-10) / FP8_MAX
    q_ENK = (blocks / scale[:, :, None, :, None]).to(torch.float8_e4m3fn).flatten(3, 4).flatten(1, 2)
    return q_ENK[:, :N, :K].contiguous(), scale


def dequantise_weights(q_ENK: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The matrices that fp8 and block scales stand for, in float64."""
    N, K = q_ENK.shape[1:]
    wide = scale.double().repeat_interleave(GROUP, 1)[:, :N].repeat_interleave(GROUP, 2)[:, :, :K]
    return q_ENK.double() * wide


def quantised(inputs: ExpertsInputs) -> Fp8Inputs:
    """The layer with its weights in fp8; gate and up are quantised apart, as two matrices."""
    gate, up = (quantise_weights(w) for w in inputs.gate_up_EJH.chunk(2, dim=1))
    down, down_scale = quantise_weights(inputs.down_EHI)
    return Fp8Inputs(
        inputs.x_TH, torch.cat((gate[0], up[0]), 1), torch.cat((gate[1], up[1]), 1), down, down_scale,
        inputs.expert_TK, inputs.weight_TK,
    )  # fmt: skip


def dequantised(inputs: Fp8Inputs) -> ExpertsInputs:
    """The layer that fp8 weights stand for, in float64, for `expert_shapes.reference`."""
    q, scale = inputs.gate_up_EJH.chunk(2, dim=1), inputs.gate_up_scale.chunk(2, dim=1)
    gate_up = torch.cat([dequantise_weights(*half) for half in zip(q, scale, strict=True)], 1)
    down = dequantise_weights(inputs.down_EHI, inputs.down_scale)
    return ExpertsInputs(inputs.x_TH, gate_up, down, inputs.expert_TK, inputs.weight_TK)


def grouped_gemm_fp8(
    x_RK: torch.Tensor,
    x_scale: torch.Tensor,
    w_ENK: torch.Tensor,
    w_scale: torch.Tensor,
    rows: ExpertRows,
    tile: Tile,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without `out_dtype`: gathered rows, SwiGLU, fp8 output with scales; with it: padded rows, plain product."""
    swiglu = out_dtype is None
    K, P, N = x_RK.shape[1], rows.slot_P.numel(), w_ENK.shape[1] // (2 if swiglu else 1)
    if tile.block_k != GROUP or GROUP % tile.block_n or (swiglu and tile.block_n != GROUP):
        raise ValueError(
            f"fp8 tiles need block_k = {GROUP} and block_n = {GROUP}, given {tile.block_k}, {tile.block_n}"
        )
    y_PN = torch.empty((P, N), dtype=out_dtype or torch.float8_e4m3fn, device=x_RK.device)
    y_scale = torch.empty((P, ceil_div(N, GROUP)) if swiglu else (0, 0), dtype=torch.float32, device=x_RK.device)
    check_contiguous(x_RK=x_RK, x_scale=x_scale, w_ENK=w_ENK, w_scale=w_scale)
    num_tiles = rows.expert_B.numel() * ceil_div(N, tile.block_n)
    if num_tiles:
        grouped_gemm_fp8_kernel[(tile.programs(num_tiles, x_RK.device),)](
            x_RK, x_scale, w_ENK, w_scale, y_PN, y_scale, rows.slot_P, rows.expert_B, rows.used,
            rows.row_TK.numel(), N, K, TOP_K=rows.row_TK.shape[1], GATHER=swiglu, SWIGLU=swiglu,
            EVEN_N=N % tile.block_n == 0, EVEN_K=K % GROUP == 0, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            GROUP=GROUP, GROUP_M=tile.group_m, FP8_MAX=FP8_MAX, UPCAST=UPCAST,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y_PN, y_scale


def experts(inputs: Fp8Inputs, tile: Tile = TILES[0]) -> torch.Tensor:
    """One layer's routed experts, [T, H] in x's dtype."""
    rows = permute(inputs.expert_TK, inputs.gate_up_EJH.shape[0], tile.block_m)
    x, x_scale = quantise_rows(inputs.x_TH)
    gated, gated_scale = grouped_gemm_fp8(x, x_scale, inputs.gate_up_EJH, inputs.gate_up_scale, rows, tile)
    y_PH, _ = grouped_gemm_fp8(gated, gated_scale, inputs.down_EHI, inputs.down_scale, rows, tile, inputs.x_TH.dtype)
    return combine(y_PH, rows, inputs.weight_TK)


def weight_bytes_per_param(shape: ExpertsShape) -> float:
    """One byte, and a 4-byte scale for each block; for `num_bytes`."""
    H, width = shape.hidden_size, shape.width
    return 1 + 4 * ceil_div(H, GROUP) * ceil_div(width, GROUP) / (H * width)
