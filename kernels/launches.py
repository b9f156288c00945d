"""Launches of every operator at published models' shapes, on tensors without storage, for `moesim.kernels.compiled`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from moesim.kernels import grouped_gemm, permute
from moesim.kernels.expert_shapes import MODELS, candidate_tiles
from moesim.kernels.tiles import Tile


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


def tiles(capability: int) -> list[Tile]:
    """Every candidate tile of that architecture, each once."""
    return list(dict.fromkeys(t for rows in (1, 64, 4096) for t in candidate_tiles(rows, capability)))


def tile_name(t: Tile) -> str:
    """Such as 128x128x64, 8 warps, 3 stages: 128x128x64w8s3."""
    return f"{t.block_m}x{t.block_n}x{t.block_k}w{t.num_warps}s{t.num_stages}"


SIZES = {name: sizes for name, *sizes in MODELS}

LAUNCHES = (
    Launch("permute", partial(sort, 64, 8, 256, 7168)),
    *(
        Launch(
            f"grouped_gemm/bf16/{tile_name(tile)}",
            partial(products, torch.bfloat16, tile, *SIZES["qwen3-30b-a3b"]),
            80 if tile in tiles(80) else 90,
        )
        for tile in tiles(90)
    ),
)
