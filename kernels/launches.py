"""Launches of every operator at published models' shapes, on tensors without storage, for `moesim.kernels.compiled`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from moesim.kernels import (
    decode_attention,
    grouped_gemm,
    grouped_gemm_decode,
    grouped_gemm_fp8,
    grouped_gemm_int4,
    memory_copy,
    permute,
    router,
)
from moesim.kernels.expert_shapes import MODELS, ExpertsInputs, candidate_tiles
from moesim.kernels.tiles import Tile, ceil_div


@dataclass(frozen=True)
class Launch:
    """One operator as a real model would call it."""

    name: str
    start: Callable[[], object]
    min_capability: int = 80


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def rows(num_tokens: int, top_k: int, num_experts: int, block_m: int) -> permute.ExpertRows:
    """Sorted rows without storage."""
    return permute.permute(meta(num_tokens, top_k, dtype=torch.int32), num_experts, block_m)


def sort(num_tokens: int, top_k: int, num_experts: int, hidden_size: int) -> None:
    """Permute, gather and combine."""
    where = rows(num_tokens, top_k, num_experts, 64)
    y_PH = permute.gather(meta(num_tokens, hidden_size), where)
    permute.combine(y_PH, where, meta(num_tokens, top_k, dtype=torch.float32))


def products(dtype: torch.dtype, tile: Tile, top_k: int, num_experts: int, hidden_size: int, width: int) -> None:
    """Both grouped GEMMs of a layer."""
    where = rows(64, top_k, num_experts, tile.block_m)
    gated = grouped_gemm.grouped_gemm(
        meta(64, hidden_size, dtype=dtype), meta(num_experts, 2 * width, hidden_size, dtype=dtype), where, tile,
        gather=True, swiglu=True,
    )  # fmt: skip
    down = meta(num_experts, hidden_size, width, dtype=dtype)
    grouped_gemm.grouped_gemm(gated, down, where, tile, gather=False, swiglu=False)


def products_fp8(tile: Tile, top_k: int, num_experts: int, hidden_size: int, width: int) -> None:
    """A layer in fp8, but for sorting and combining."""
    where, dtype = rows(64, top_k, num_experts, tile.block_m), torch.float8_e4m3fn
    x, x_scale = grouped_gemm_fp8.quantise_rows(meta(64, hidden_size))
    blocks_h, blocks_i = ceil_div(hidden_size, grouped_gemm_fp8.GROUP), ceil_div(width, grouped_gemm_fp8.GROUP)
    gate_up = meta(num_experts, 2 * width, hidden_size, dtype=dtype)
    up_scale = meta(num_experts, 2 * blocks_i, blocks_h, dtype=torch.float32)
    gated, gated_scale = grouped_gemm_fp8.grouped_gemm_fp8(x, x_scale, gate_up, up_scale, where, tile)
    down = meta(num_experts, hidden_size, width, dtype=dtype)
    down_scale = meta(num_experts, blocks_h, blocks_i, dtype=torch.float32)
    grouped_gemm_fp8.grouped_gemm_fp8(gated, gated_scale, down, down_scale, where, tile, torch.bfloat16)


def products_int4(tile: Tile, top_k: int, num_experts: int, hidden_size: int, width: int) -> None:
    """A layer with 4-bit weights."""
    byte, group = torch.uint8, tile.block_k
    inputs = grouped_gemm_int4.Int4Inputs(
        meta(64, hidden_size),
        meta(num_experts, 2 * width, hidden_size // 2, dtype=byte), meta(num_experts, 2 * width, hidden_size // group),
        meta(num_experts, hidden_size, width // 2, dtype=byte), meta(num_experts, hidden_size, width // group),
        meta(64, top_k, dtype=torch.int32), meta(64, top_k, dtype=torch.float32),
    )  # fmt: skip
    grouped_gemm_int4.experts(inputs, tile)


def stream(tile: Tile, top_k: int, num_experts: int, hidden_size: int, width: int) -> None:
    """A layer that streams its weights for one token."""
    inputs = ExpertsInputs(
        meta(1, hidden_size), meta(num_experts, 2 * width, hidden_size), meta(num_experts, hidden_size, width),
        meta(1, top_k, dtype=torch.int32), meta(1, top_k, dtype=torch.float32),
    )  # fmt: skip
    grouped_gemm_decode.experts(inputs, tile)


def route(rule: router.Rule, num_experts: int) -> None:
    """Routing of one step."""
    bias = meta(num_experts, dtype=torch.float32) if rule.scoring == "sigmoid" else None
    router.route(meta(64, num_experts, dtype=torch.float32), rule, bias)


def attend(shape: decode_attention.AttentionShape, sizes: decode_attention.Split) -> None:
    """Decode attention over pages of 64 tokens."""
    pages = ceil_div(shape.context, 64)
    decode_attention.decode_attention(
        meta(shape.num_sequences, shape.num_heads, shape.k_width),
        meta(shape.num_sequences * pages, 64, shape.kv_heads, shape.k_width),
        None if shape.shared else meta(shape.num_sequences * pages, 64, shape.kv_heads, shape.width),
        meta(shape.num_sequences, pages, dtype=torch.int32), meta(shape.num_sequences, dtype=torch.int32),
        shape.k_width**-0.5, shape.width, sizes,
    )  # fmt: skip


def tiles(capability: int) -> list[Tile]:
    """Every candidate tile of that architecture, each once."""
    return list(dict.fromkeys(t for rows in (1, 64, 4096) for t in candidate_tiles(rows, capability)))


def tile_name(t: Tile) -> str:
    """Such as 128x128x64, 8 warps, 3 stages: 128x128x64w8s3."""
    return f"{t.block_m}x{t.block_n}x{t.block_k}w{t.num_warps}s{t.num_stages}"


SIZES = {name: sizes for name, *sizes in MODELS}
QWEN = SIZES["qwen3-30b-a3b"]
ATTENTION = {shape.name: shape for shape in decode_attention.CASES}


def split_name(s: decode_attention.Split) -> str:
    """Such as 64x16, 8 splits, 4 warps, 3 stages: 64x16x8w4s3."""
    return f"{s.block_context}x{s.block_heads}x{s.num_splits}w{s.num_warps}s{s.num_stages}"


LAUNCHES = (
    Launch("permute", partial(sort, 64, 8, 256, 7168)),
    Launch("memory_copy", partial(memory_copy.copy, meta(1 << 28), meta(1 << 28))),
    Launch("router/softmax", partial(route, router.Rule(8), 128)),
    Launch("router/deepseek-v3", partial(route, router.Rule(8, "sigmoid", True, 8, 4, 2.5), 256)),
    *(
        Launch(
            f"grouped_gemm/bf16/{tile_name(tile)}",
            partial(products, torch.bfloat16, tile, *QWEN),
            80 if tile in tiles(80) else 90,
        )
        for tile in tiles(90)
    ),
    *(
        Launch(f"grouped_gemm_decode/bf16/{tile_name(tile)}", partial(stream, tile, *QWEN))
        for tile in grouped_gemm_decode.TILES
    ),
    *(
        Launch(f"grouped_gemm_fp8/{tile_name(tile)}", partial(products_fp8, tile, *SIZES["deepseek-v3"]), 89)
        for tile in grouped_gemm_fp8.TILES
    ),
    *(
        Launch(f"grouped_gemm_int4/{tile_name(tile)}", partial(products_int4, tile, *QWEN))
        for tile in grouped_gemm_int4.TILES
    ),
    *(
        Launch(f"decode_attention/gqa/{split_name(sizes)}", partial(attend, ATTENTION["qwen3-30b-a3b/16x8192"], sizes))
        for sizes in decode_attention.GQA_SPLITS
    ),
    *(
        Launch(f"decode_attention/mla/{split_name(sizes)}", partial(attend, ATTENTION["deepseek-v3/16x8192"], sizes))
        for sizes in decode_attention.MLA_SPLITS
    ),
)
