"""Grouped GEMM of the experts with 4-bit weights, widened on the way to the matrix unit (W4A16).

Groups of `2 x half` weights along K share one scale; q in 0..15 stands for (q - 8) x scale. Byte j of a group holds
weight j in its low and weight half + j in its high nibble, so that both halves are used without moving values between
threads. Weights are the left operand: the matrix unit takes that one from registers, where widening leaves it.

Source: group-wise symmetric 4-bit weights as in GPTQ, arXiv 2210.17323; the layout is our own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from moesim.kernels.expert_shapes import CASES, ExpertsInputs, flops, num_bytes
from moesim.kernels.grouped_gemm import product, tile_of
from moesim.kernels.permute import ExpertRows, combine, permute
from moesim.kernels.tiles import UPCAST, Tile, ceil_div, check_contiguous

__all__ = ["CASES", "experts", "flops", "grouped_gemm_int4", "num_bytes", "weight_bytes_per_param"]

#: Default and candidates; block_k is the size of a group of weights with one scale.
TILES = (Tile(16, 64, 128, 1, 4, 4), Tile(32, 64, 128, 4, 4, 3), Tile(64, 32, 128, 4, 4, 3))


@triton.jit
def half_product(w, x, acc, UPCAST: tl.constexpr):
    """acc + (w - 8) @ x, w unsigned 4-bit values."""
    w = w.to(tl.int8) - 8
    return product(w.to(tl.float32 if UPCAST else x.dtype), x, acc, UPCAST)


@triton.jit
def packed_product(w, x_low, x_high, UPCAST: tl.constexpr):
    """One group's product [BLOCK_N, BLOCK_M] before its scale."""
    acc = tl.zeros([w.shape[0], x_low.shape[1]], tl.float32)
    acc = half_product(w & 15, x_low, acc, UPCAST)
    return half_product(w >> 4, x_high, acc, UPCAST)


@triton.jit
def grouped_gemm_int4_kernel(
    x_ptr, w_ptr, scale_ptr, y_ptr, slot_ptr, expert_ptr, used_ptr, S, N, K,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, GROUP_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """As grouped_gemm_kernel; w [E, N or 2N, K / 2] bytes, scale [E, N or 2N, K / (2 HALF)]. The tile is transposed."""
    num_row_blocks = tl.load(used_ptr)
    num_column_blocks = tl.cdiv(N, BLOCK_N)
    groups = K // (2 * HALF)
    halves: tl.constexpr = 2 if SWIGLU else 1
    for tile in range(tl.program_id(0), num_row_blocks * num_column_blocks, tl.num_programs(0)):
        block, column_block = tile_of(tile, num_row_blocks, num_column_blocks, GROUP_M)
        expert = tl.load(expert_ptr + block).to(tl.int64)
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, HALF)
        if GATHER:
            slot = tl.load(slot_ptr + row)
            source = (slot // TOP_K).to(tl.int64)
            real = (slot < S)[None, :]
        else:
            source = row.to(tl.int64)
            real = (row >= 0)[None, :]
        wide = column < N
        line = expert * halves * N + column
        a_ptr = x_ptr + source[None, :] * K + k[:, None]
        b_ptr = w_ptr + line[:, None] * (K // 2) + k[None, :]
        s_ptr = scale_ptr + line * groups
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if SWIGLU:
            acc_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for group in range(0, groups):
            x_low = tl.load(a_ptr + group * 2 * HALF, mask=real, other=0.0)
            x_high = tl.load(a_ptr + group * 2 * HALF + HALF, mask=real, other=0.0)
            w = tl.load(b_ptr + group * HALF, mask=wide[:, None], other=0)
            scale = tl.load(s_ptr + group, mask=wide, other=0.0).to(tl.float32)
            acc += packed_product(w, x_low, x_high, UPCAST) * scale[:, None]
            if SWIGLU:
                w = tl.load(b_ptr + N.to(tl.int64) * (K // 2) + group * HALF, mask=wide[:, None], other=0)
                scale = tl.load(s_ptr + N * groups + group, mask=wide, other=0.0).to(tl.float32)
                acc_up += packed_product(w, x_low, x_high, UPCAST) * scale[:, None]
        if SWIGLU:
            acc = acc * tl.sigmoid(acc) * acc_up
        y = y_ptr + row.to(tl.int64)[None, :] * N + column[:, None]
        tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=wide[:, None])


@dataclass(frozen=True)
class Int4Inputs:
    """One layer's tensors; weights are bytes of two, scales have x's dtype."""

    x_TH: torch.Tensor
    gate_up: torch.Tensor  # uint8 [E, 2 x width, H / 2]
    gate_up_scale: torch.Tensor  # [E, 2 x width, H / group]
    down: torch.Tensor  # uint8 [E, H, width / 2]
    down_scale: torch.Tensor  # [E, H, width / group]
    expert_TK: torch.Tensor
    weight_TK: torch.Tensor


def pack(w_ENK: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to 4 bits, group by group: bytes [E, N, K / 2] and scales [E, N, K / group] in w's dtype."""
    if w_ENK.shape[2] % group:
        raise ValueError(f"columns must be whole groups of {group}, given {w_ENK.shape[2]}")
    w = w_ENK.unflatten(2, (-1, group))
    scale = (w.abs().amax(-1) / 7).clamp(min=1e-6)
    q = ((w / scale[..., None]).round().clamp(-8, 7) + 8).to(torch.uint8)
    low, high = q.chunk(2, dim=-1)
    return (low | (high << 4)).flatten(2).contiguous(), scale.contiguous()


def unpack(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The matrices [E, N, K] that bytes and scales stand for, in float64."""
    w = packed.unflatten(2, (scale.shape[2], -1))
    q = torch.cat((w & 15, w >> 4), dim=-1).double() - 8
    return (q * scale.double()[..., None]).flatten(2)


def quantised(inputs: ExpertsInputs, group: int = 128) -> Int4Inputs:
    """The layer with its weights in 4 bits."""
    return Int4Inputs(
        inputs.x_TH, *pack(inputs.gate_up_EJH, group), *pack(inputs.down_EHI, group), inputs.expert_TK, inputs.weight_TK
    )


def dequantised(inputs: Int4Inputs) -> ExpertsInputs:
    """The layer that 4-bit weights stand for, in float64, for `expert_shapes.reference`."""
    gate_up, down = unpack(inputs.gate_up, inputs.gate_up_scale), unpack(inputs.down, inputs.down_scale)
    return ExpertsInputs(inputs.x_TH, gate_up, down, inputs.expert_TK, inputs.weight_TK)


def grouped_gemm_int4(
    x_RK: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    rows: ExpertRows,
    tile: Tile,
    *,
    gather: bool,
    swiglu: bool,
) -> torch.Tensor:
    """Each padded row times its expert's matrix, [P, N]; K must be whole groups of `tile.block_k`."""
    K, P, N = x_RK.shape[1], rows.slot_P.numel(), w.shape[1] // (2 if swiglu else 1)
    if scale.shape[2] * tile.block_k != K or w.shape[2] * 2 != K:
        raise ValueError(
            f"tile.block_k must be the group size: {K} columns, {scale.shape[2]} scales, {w.shape[2]} bytes a row, "
            f"block_k {tile.block_k}"
        )
    y_PN = x_RK.new_empty(P, N)
    check_contiguous(x_RK=x_RK, w=w, scale=scale)
    num_tiles = rows.expert_B.numel() * ceil_div(N, tile.block_n)
    if num_tiles:
        grouped_gemm_int4_kernel[(tile.programs(num_tiles, x_RK.device),)](
            x_RK, w, scale, y_PN, rows.slot_P, rows.expert_B, rows.used, rows.row_TK.numel(), N, K,
            TOP_K=rows.row_TK.shape[1], GATHER=gather, SWIGLU=swiglu, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            HALF=tile.block_k // 2, GROUP_M=tile.group_m, UPCAST=UPCAST,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y_PN


def experts(inputs: Int4Inputs, tile: Tile = TILES[0]) -> torch.Tensor:
    """One layer's routed experts, [T, H]."""
    rows = permute(inputs.expert_TK, inputs.gate_up.shape[0], tile.block_m)
    gated = grouped_gemm_int4(inputs.x_TH, inputs.gate_up, inputs.gate_up_scale, rows, tile, gather=True, swiglu=True)
    y_PH = grouped_gemm_int4(gated, inputs.down, inputs.down_scale, rows, tile, gather=False, swiglu=False)
    return combine(y_PH, rows, inputs.weight_TK)


def weight_bytes_per_param(group: int = 128) -> float:
    """Half a byte and a share of a 2-byte scale; for `num_bytes`."""
    return 0.5 + 2 / group
