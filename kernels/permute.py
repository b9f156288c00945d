"""Token permute and unpermute: sort the chosen (token, choice) slots by expert, and combine the experts' outputs.

A slot is `token * K + choice`. Slots of one expert become consecutive rows, padded to a multiple of `block_m`, so
that every block of rows of the grouped GEMM belongs to one expert. The sort is stable and uses no atomics: two runs
give the same rows. Nothing is copied to the host; buffers are as large as the worst case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from moesim.kernels.tiles import ceil_div, check_contiguous, power_of_two

#: Rows that one program copies.
GATHER_ROWS = 8


@dataclass(frozen=True)
class ExpertRows:
    """Where each slot went.

    Slots whose expert id is not in 0..E-1 (such as an expert-parallel rank's "not mine") have no row.
    """

    slot_P: torch.Tensor  # int32: slot in each padded row; S where the row is padding or unused
    row_TK: torch.Tensor  # int32: padded row of each slot; -1 where it has none
    expert_B: torch.Tensor  # int32: expert of each block of rows; -1 for unused blocks
    used: torch.Tensor  # int32 [1]: blocks in use; they come first
    count_E: torch.Tensor  # int32: slots of each expert
    block_m: int


@triton.jit
def count_kernel(expert_ptr, count_ptr, S, E, E_PAD: tl.constexpr, CHUNK: tl.constexpr):
    """Slots of each expert in one chunk of slots."""
    chunk = tl.program_id(0)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(expert_ptr + slot, mask=slot < S, other=-1).to(tl.int32)
    column = tl.arange(0, E_PAD)
    count = tl.sum((expert[:, None] == column[None, :]).to(tl.int32), axis=0)
    tl.store(count_ptr + chunk * E + column, count, mask=column < E)


@triton.jit
def offset_kernel(
    count_ptr, total_ptr, expert_ptr, used_ptr, num_chunks, E, B,
    E_PAD: tl.constexpr, B_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Chunk counts become first rows, in place; each block of rows learns its expert. One program."""
    column = tl.arange(0, E_PAD)
    total = tl.zeros([E_PAD], tl.int32)
    for chunk in range(num_chunks):
        total += tl.load(count_ptr + chunk * E + column, mask=column < E, other=0)
    tl.store(total_ptr + column, total, mask=column < E)
    blocks = (total + BLOCK_M - 1) // BLOCK_M
    end = tl.cumsum(blocks, axis=0)
    row = (end - blocks) * BLOCK_M
    for chunk in range(num_chunks):
        count = tl.load(count_ptr + chunk * E + column, mask=column < E, other=0)
        tl.store(count_ptr + chunk * E + column, row, mask=column < E)
        row += count
    used = tl.sum(blocks, axis=0)
    tl.store(used_ptr, used)
    for start in range(0, B, B_PAD):
        block = start + tl.arange(0, B_PAD)
        # The expert of a block is the number of experts that end at or before it.
        expert = tl.sum((end[None, :] <= block[:, None]).to(tl.int32), axis=1)
        tl.store(expert_ptr + block, tl.where(block < used, expert, -1), mask=block < B)


@triton.jit
def place_kernel(expert_ptr, first_ptr, slot_ptr, row_ptr, S, E, E_PAD: tl.constexpr, CHUNK: tl.constexpr):
    """Row of each slot of one chunk: the chunk's first row of its expert plus its rank among the chunk's slots."""
    chunk = tl.program_id(0)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(expert_ptr + slot, mask=slot < S, other=-1).to(tl.int32)
    column = tl.arange(0, E_PAD)
    chosen = (expert[:, None] == column[None, :]) & (column < E)[None, :]
    rank = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    first = tl.load(first_ptr + chunk * E + column, mask=column < E, other=0)
    row = tl.sum(tl.where(chosen, rank + first[None, :], 0), axis=1)
    placed = (expert >= 0) & (expert < E)
    tl.store(row_ptr + slot, tl.where(placed, row, -1), mask=slot < S)
    tl.store(slot_ptr + row, slot, mask=placed & (slot < S))


@triton.jit
def gather_kernel(
    x_ptr, slot_ptr, y_ptr, used_ptr, S, H,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Copy token rows to padded rows; padding of used blocks becomes zero, unused blocks stay untouched."""
    first = tl.program_id(0) * ROWS
    if first < tl.load(used_ptr) * BLOCK_M:
        row = first + tl.arange(0, ROWS)
        column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        slot = tl.load(slot_ptr + row)
        token = (slot // TOP_K).to(tl.int64)
        inside = (column < H)[None, :]
        value = tl.load(x_ptr + token[:, None] * H + column[None, :], mask=(slot < S)[:, None] & inside, other=0.0)
        tl.store(y_ptr + row.to(tl.int64)[:, None] * H + column[None, :], value, mask=inside)


@triton.jit
def combine_kernel(
    y_ptr, row_ptr, weight_ptr, out_ptr, H, split_stride,
    TOP_K: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weight[t, k] x y[row[t, k]], partial sums of y added first; all in fp32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < H
    total = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_ptr + token * TOP_K + k).to(tl.int64)
        weight = tl.load(weight_ptr + token * TOP_K + k).to(tl.float32)
        for split in tl.static_range(NUM_SPLITS):
            part = tl.load(y_ptr + split * split_stride + row * H + column, mask=inside & (row >= 0), other=0.0)
            total += weight * part.to(tl.float32)
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def num_blocks(num_slots: int, num_experts: int, block_m: int) -> int:
    """Blocks of rows in the worst case: every slot full, and one partly filled block per expert that can have one."""
    return ceil_div(num_slots + min(num_slots, num_experts) * (block_m - 1), block_m)


def permute(expert_TK: torch.Tensor, num_experts: int, block_m: int) -> ExpertRows:
    """Sort the slots of integer expert ids [T, K] by expert, stably; `block_m` is a power of two."""
    check_contiguous(expert_TK=expert_TK)
    if block_m < 1 or block_m & (block_m - 1):
        raise ValueError(f"block_m must be a power of two, given {block_m}")
    S, E, device = expert_TK.numel(), num_experts, expert_TK.device
    e_pad, B = power_of_two(E), num_blocks(S, E, block_m)
    # A program holds a chunk x E table of flags: 64 of them a thread.
    chunk = max(16, min(256, 8192 // e_pad))
    chunks = ceil_div(S, chunk)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    slot_P = torch.full((B * block_m,), S, dtype=torch.int32, device=device)
    rows = ExpertRows(slot_P, empty(*expert_TK.shape), empty(B), empty(1), empty(E), block_m)
    count_CE = empty(max(1, chunks), E)
    if chunks:
        count_kernel[(chunks,)](expert_TK, count_CE, S, E, E_PAD=e_pad, CHUNK=chunk)
    offset_kernel[(1,)](
        count_CE, rows.count_E, rows.expert_B, rows.used, chunks, E, B,
        E_PAD=e_pad, B_PAD=min(64, power_of_two(max(1, B))), BLOCK_M=block_m,
    )  # fmt: skip
    if chunks:
        place_kernel[(chunks,)](expert_TK, count_CE, slot_P, rows.row_TK, S, E, E_PAD=e_pad, CHUNK=chunk)
    return rows


def gather(x_TH: torch.Tensor, rows: ExpertRows, y_PH: torch.Tensor | None = None) -> torch.Tensor:
    """Token rows in expert order, [P, H]; rows of unused blocks are left as they were."""
    H, S, K = x_TH.shape[1], rows.row_TK.numel(), rows.row_TK.shape[1]
    if y_PH is None:
        y_PH = x_TH.new_empty(rows.slot_P.numel(), H)
    check_contiguous(x_TH=x_TH, y_PH=y_PH)
    block_h, copied = min(512, power_of_two(H)), min(GATHER_ROWS, rows.block_m)
    if rows.slot_P.numel():
        gather_kernel[(rows.slot_P.numel() // copied, ceil_div(H, block_h))](
            x_TH, rows.slot_P, y_PH, rows.used, S, H,
            TOP_K=K, BLOCK_M=rows.block_m, ROWS=copied, BLOCK_H=block_h,
        )  # fmt: skip
    return y_PH


def combine(
    y_SPH: torch.Tensor, rows: ExpertRows, weight_TK: torch.Tensor, out_TH: torch.Tensor | None = None
) -> torch.Tensor:
    """Weighted sum of each token's rows, [T, H]; y is [P, H], or partial sums [splits, P, H].

    Written in y's dtype unless `out_TH` is given.
    """
    (T, K), (P, H) = rows.row_TK.shape, y_SPH.shape[-2:]
    if out_TH is None:
        out_TH = y_SPH.new_empty(T, H)
    check_contiguous(y_SPH=y_SPH, weight_TK=weight_TK, out_TH=out_TH)
    splits = y_SPH.shape[0] if y_SPH.ndim == 3 else 1
    block_h = min(1024, power_of_two(H))
    if T:
        combine_kernel[(T, ceil_div(H, block_h))](
            y_SPH, rows.row_TK, weight_TK, out_TH, H, P * H, TOP_K=K, NUM_SPLITS=splits, BLOCK_H=block_h
        )
    return out_TH


def combine_reference(y_PH: torch.Tensor, rows: ExpertRows, weight_TK: torch.Tensor) -> torch.Tensor:
    """The weighted sum in float64."""
    row_TK = rows.row_TK.long()
    y_TKH = y_PH.double()[row_TK.clamp(min=0)]
    y_TKH = torch.where((row_TK >= 0)[..., None], y_TKH, 0.0)
    return (y_TKH * weight_TK.double()[..., None]).sum(1)


def gather_bytes(num_tokens: int, top_k: int, hidden_size: int, bytes_per_value: int) -> int:
    """Bytes that permuting moves without padding: every slot's row read and written."""
    return 2 * num_tokens * top_k * hidden_size * bytes_per_value


def combine_bytes(num_tokens: int, top_k: int, hidden_size: int, bytes_per_value: int) -> int:
    """Bytes that combining moves: every slot's row and fp32 weight read, one row per token written."""
    return num_tokens * ((top_k + 1) * hidden_size * bytes_per_value + 8 * top_k)


def combine_flops(num_tokens: int, top_k: int, hidden_size: int) -> int:
    """One multiply-add per value of every slot."""
    return 2 * num_tokens * top_k * hidden_size


#: (num_tokens, top_k, num_experts, hidden_size): Mixtral-8x7B, OLMoE-1B-7B, Qwen3-30B-A3B, DeepSeek-V3.
CASES = tuple(
    (tokens, *model)
    for model in ((2, 8, 4096), (8, 64, 2048), (8, 128, 2048), (8, 256, 7168))
    for tokens in (1, 64, 1024, 8192)
)
