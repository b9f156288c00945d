"""Decode attention over a paged cache: one query token per sequence, its context split over programs.

Grouped-query attention: Hq query heads share Hk heads of keys and values. Latent attention (MLA, DeepSeek) in its
absorbed form is the same with one head whose keys are 512 + 64 wide and whose values are the first 512 columns of the
keys, so each cached row is read once. Partial results carry the logarithm of their softmax sum and are merged.

Sources: Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023); paged cache, arXiv 2309.06180; MLA, arXiv 2405.04434.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from moesim.kernels.grouped_gemm import product
from moesim.kernels.tiles import UPCAST, ceil_div, check_contiguous, power_of_two

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Split:
    """Sizes of one launch: what an autotuner chooses among. `block_heads` is at least 16, the matrix unit's side."""

    block_context: int = 64
    block_heads: int = 16
    num_splits: int = 8
    num_warps: int = 4
    num_stages: int = 3


GQA_SPLITS = (Split(64), Split(128, num_stages=2), Split(64, num_splits=16), Split(32, num_stages=4))
MLA_SPLITS = (Split(32, num_warps=4, num_stages=2), Split(32, 16, 16, 8, 2), Split(64, 16, 16, 8, 2))


@triton.jit
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, part_ptr, log_sum_ptr, scale_log2, max_pages, group_size,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, K_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr, ROPE: tl.constexpr, SHARED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One sequence, some heads that share keys, one share of the context. Keys are K_WIDTH = WIDTH + ROPE wide."""
    sequence, split = tl.program_id(0), tl.program_id(2)
    num_splits = tl.num_programs(2)
    blocks_per_group = tl.cdiv(group_size, BLOCK_H)
    kv_head = tl.program_id(1) // blocks_per_group
    member = tl.program_id(1) % blocks_per_group * BLOCK_H + tl.arange(0, BLOCK_H)
    head = kv_head * group_size + member
    column = tl.arange(0, WIDTH_PAD)
    real = (member < group_size)[:, None]
    q_line = (sequence * NUM_HEADS + head).to(tl.int64)[:, None] * K_WIDTH
    q = tl.load(q_ptr + q_line + column[None, :], mask=real & (column < WIDTH)[None, :], other=0.0)
    if ROPE > 0:
        rope = WIDTH + tl.arange(0, ROPE)
        q_rope = tl.load(q_ptr + q_line + rope[None, :], mask=real, other=0.0)
    length = tl.load(length_ptr + sequence)
    share = tl.cdiv(tl.cdiv(length, num_splits), BLOCK_N) * BLOCK_N
    first = split * share
    last = tl.minimum(first + share, length)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, WIDTH_PAD], tl.float32)
    for start in range(first, last, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        inside = position < last
        page = tl.load(table_ptr + sequence * max_pages + position // PAGE, mask=inside, other=0)
        line = (page.to(tl.int64) * PAGE + position % PAGE) * KV_HEADS + kv_head
        mask = inside[:, None] & (column < WIDTH)[None, :]
        k = tl.load(k_ptr + line[:, None] * K_WIDTH + column[None, :], mask=mask, other=0.0)
        score = product(q, tl.trans(k), tl.zeros([BLOCK_H, BLOCK_N], tl.float32), UPCAST)
        if ROPE > 0:
            k_rope = tl.load(k_ptr + line[:, None] * K_WIDTH + rope[None, :], mask=inside[:, None], other=0.0)
            score = product(q_rope, tl.trans(k_rope), score, UPCAST)
        score = tl.where(inside[None, :], score * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        power = tl.exp2(score - new_top[:, None])
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.sum(power, axis=1)
        top = new_top
        v = k if SHARED else tl.load(v_ptr + line[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
        acc = product(power.to(v.dtype), v, acc * keep[:, None], UPCAST)
    empty = first >= last
    part_line = ((sequence * NUM_HEADS + head) * num_splits + split).to(tl.int64)
    part = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(part_ptr + part_line[:, None] * WIDTH + column[None, :], part, mask=real & (column < WIDTH)[None, :])
    log_sum = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(log_sum_ptr + part_line, log_sum, mask=member < group_size)


@triton.jit
def merge_kernel(
    part_ptr, log_sum_ptr, out_ptr, NUM_SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """One head of one sequence: partial results weighted by their softmax sums; a context of length 0 gives zeros."""
    line = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS_PAD), tl.arange(0, WIDTH_PAD)
    log_sum = tl.load(log_sum_ptr + line * NUM_SPLITS + split, mask=split < NUM_SPLITS, other=float("-inf"))
    top = tl.max(log_sum, axis=0)
    power = tl.exp2(log_sum - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(power, axis=0)
    weight = power / tl.where(total == 0.0, 1.0, total)
    mask = (split < NUM_SPLITS)[:, None] & (column < WIDTH)[None, :]
    at = (line * NUM_SPLITS + split)[:, None] * WIDTH + column[None, :]
    out = tl.sum(tl.load(part_ptr + at, mask=mask, other=0.0) * weight[:, None], axis=0)
    tl.store(out_ptr + line * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=column < WIDTH)


def decode_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    width: int,
    sizes: Split | None = None,
) -> torch.Tensor:
    """Attention of one query token per sequence, [sequences, heads, width] in q's dtype.

    Args:
        q: [sequences, heads, key width].
        k_pages: [pages, tokens of a page, key heads, key width].
        v_pages: [pages, tokens of a page, key heads, width]; None when values are the first `width` columns of keys.
        table: int32 [sequences, pages at most], the pages of each sequence in order.
        length: int32 [sequences], tokens in the cache, the query's own included.
        scale: what scores are multiplied with before the softmax.
        width: of values; key width minus width must be 0 or a power of two of at least 16.
        sizes: see `Split`.
    """
    (num_sequences, num_heads, k_width), (page, kv_heads) = q.shape, k_pages.shape[1:3]
    if num_heads % kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide into {kv_heads} groups of equal size")
    rope = k_width - width
    if rope and (rope < 16 or rope & (rope - 1)):
        raise ValueError(f"key width minus width must be 0 or a power of two from 16, given {k_width} - {width}")
    sizes = sizes or (MLA_SPLITS if v_pages is None else GQA_SPLITS)[0]
    v_pages = k_pages if v_pages is None else v_pages
    check_contiguous(q=q, k_pages=k_pages, v_pages=v_pages, table=table, length=length)
    out = q.new_empty(num_sequences, num_heads, width)
    part = q.new_empty(num_sequences, num_heads, sizes.num_splits, width, dtype=torch.float32)
    log_sum = q.new_empty(num_sequences, num_heads, sizes.num_splits, dtype=torch.float32)
    group = num_heads // kv_heads
    grid = (num_sequences, kv_heads * ceil_div(group, sizes.block_heads), sizes.num_splits)
    if out.numel():
        decode_attention_kernel[grid](
            q, k_pages, v_pages, table, length, part, log_sum, scale * LOG2_E, table.shape[1], group,
            NUM_HEADS=num_heads, KV_HEADS=kv_heads, PAGE=page, K_WIDTH=k_width, WIDTH=width,
            WIDTH_PAD=power_of_two(width), ROPE=rope, SHARED=v_pages is k_pages, BLOCK_H=sizes.block_heads,
            BLOCK_N=sizes.block_context, UPCAST=UPCAST, num_warps=sizes.num_warps, num_stages=sizes.num_stages,
        )  # fmt: skip
        merge_kernel[(num_sequences * num_heads,)](
            part, log_sum, out, NUM_SPLITS=sizes.num_splits, SPLITS_PAD=power_of_two(sizes.num_splits),
            WIDTH=width, WIDTH_PAD=power_of_two(width),
        )  # fmt: skip
    return out


def reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    width: int,
) -> torch.Tensor:
    """The same in float64, one sequence after another."""
    out = torch.zeros(*q.shape[:2], width, dtype=torch.float64, device=q.device)
    v_pages = k_pages[..., :width] if v_pages is None else v_pages
    group = q.shape[1] // k_pages.shape[2]
    for b, tokens in enumerate(length.tolist()):
        k, v = (pages[table[b].long()].flatten(0, 1)[:tokens].double() for pages in (k_pages, v_pages))
        k, v = (cached.repeat_interleave(group, dim=1) for cached in (k, v))
        share = torch.einsum("hd,nhd->hn", q[b].double(), k).mul(scale).softmax(1)
        out[b] = torch.einsum("hn,nhd->hd", share, v)
    return out


@dataclass(frozen=True)
class AttentionShape:
    """`context` tokens in each sequence's cache; `shared`: values are columns of the keys."""

    name: str
    num_sequences: int
    context: int
    num_heads: int
    kv_heads: int
    k_width: int
    width: int
    shared: bool = False


def flops(shape: AttentionShape) -> int:
    """Scores and weighted sum; a multiply-add is 2, the softmax is not counted."""
    return 2 * shape.num_sequences * shape.context * shape.num_heads * (shape.k_width + shape.width)


def num_bytes(shape: AttentionShape, bytes_per_value: int = 2) -> int:
    """The cache read once, queries read, output written; partial results and the page table not counted."""
    cached = shape.context * shape.kv_heads * (shape.k_width + (0 if shape.shared else shape.width))
    return shape.num_sequences * (cached + shape.num_heads * (shape.k_width + shape.width)) * bytes_per_value


#: Mixtral-8x7B, Qwen3-30B-A3B and DeepSeek-V3, from their config.json.
CASES = tuple(
    AttentionShape(f"{name}/{batch}x{context}", batch, context, *sizes)
    for name, *sizes in (
        ("mixtral-8x7b", 32, 8, 128, 128), ("qwen3-30b-a3b", 32, 4, 128, 128),
        ("deepseek-v3", 128, 1, 576, 512, True),
    )
    for batch in (1, 16, 64)
    for context in (1024, 8192, 32768)
)  # fmt: skip
