"""Work of one operator call from its coordinates: FLOP and bytes moved, as a roofline wants them.

A measured table names its operator and the coordinates of its points; `work` turns them into the two numbers that set
the shape of its time. What a kernel does besides (tiles, caches, launches) is left to the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from moesim.model import BYTES_PER_PARAM

Floats = NDArray[np.float64]
Coordinates = Mapping[str, Floats]

_WIDTHS = {"int4_wo": 0.5, "w4a16_mxfp4": 0.53, "w4a8_mxfp4_mxfp8": 0.53, "nvfp4": 0.5625}
"""Bytes per weight of formats that only tables know: four bits, with a scale per 32 (MXFP4) or 16 (NVFP4) of them."""


def weight_bytes(dtype: str) -> float:
    """Bytes of one weight (or element); 2 where the format is not known."""
    return float(BYTES_PER_PARAM.get(dtype, _WIDTHS.get(dtype, 2.0)))


def _gemm(x: Coordinates, width: float) -> tuple[Floats, Floats]:
    m, n, k = x["m"], x["n"], x["k"]
    return 2 * m * n * k, width * (n * k + m * k) + 2 * m * n


def _grouped_gemm(x: Coordinates, width: float) -> tuple[Floats, Floats]:
    flops, num_bytes = _gemm(x, width)
    return x["num_experts"] * flops, x["num_experts"] * num_bytes


def _mla_bmm(x: Coordinates, width: float) -> tuple[Floats, Floats]:
    """One 128 x 512 product per head: queries into the latent space, or values out of it (DeepSeek-V3)."""
    flops, num_bytes = _gemm({"m": x["m"], "n": np.full_like(x["m"], 512), "k": np.full_like(x["m"], 128)}, width)
    return x["num_heads"] * flops, x["num_heads"] * num_bytes


def moe_work(
    rows: Floats, active: Floats, hidden: Floats | float, inter: Floats | float, dtype: str
) -> tuple[Floats, Floats]:
    """Gated experts (three matrices each): `rows` tokens in all, at `active` experts that have any.

    hidden, inter: widths, the latter of one expert's slice on the rank.
    """
    flops = 6 * rows * hidden * inter
    num_bytes = 3 * active * hidden * inter * weight_bytes(dtype) + rows * (4 * hidden + 6 * inter)
    return np.asarray(flops), np.asarray(num_bytes)


def expected_active(rows: Floats, experts: Floats) -> Floats:
    """Experts that get a token, in the mean, when each of `rows` choices is uniform."""
    return np.asarray(experts * -np.expm1(rows * np.log1p(-1 / np.maximum(experts, 1 + 1e-9))))


def _moe(x: Coordinates, dtype: str) -> tuple[Floats, Floats]:
    rows, experts = x["num_tokens"] * x["top_k"] / x["ep"], x["num_experts"] / x["ep"]
    return moe_work(rows, expected_active(rows, experts), x["hidden_size"], x["inter_size"] / x["tp"], dtype)


def _context_attention(x: Coordinates, width: float) -> tuple[Floats, Floats]:
    """Causal: a query sees half of the keys in the mean."""
    tokens, dim = x["batch_size"] * x["seq_len"], x["head_dim"]
    flops = 2 * tokens * (x["seq_len"] + 1) * x["num_heads"] * dim
    return flops, tokens * dim * (4 * x["num_heads"] + 2 * width * x["num_kv_heads"])


def _generation_attention(x: Coordinates, width: float) -> tuple[Floats, Floats]:
    cached, dim = x["batch_size"] * x["kv_len"], x["head_dim"]
    return 4 * cached * x["num_heads"] * dim, 2 * width * cached * x["num_kv_heads"] * dim


def _context_mla(x: Coordinates, width: float) -> tuple[Floats, Floats]:
    """Keys of 192, values of 128 (DeepSeek-V3)."""
    tokens = x["batch_size"] * x["seq_len"]
    return tokens * (x["seq_len"] + 1) * x["num_heads"] * 320, tokens * x["num_heads"] * (
        2 * 192 + 2 * 128 + width * 320
    )


def _generation_mla(x: Coordinates, width: float) -> tuple[Floats, Floats]:
    """Absorbed: every head reads the same 576 numbers of a cached token (DeepSeek-V3)."""
    cached = x["batch_size"] * x["kv_len"]
    return 2 * cached * x["num_heads"] * (576 + 512), width * cached * 576


def _exchange(x: Coordinates, width: float) -> tuple[Floats, Floats]:
    """A row of two bytes per number for each token and each of its experts."""
    num_bytes = 2 * x["num_tokens"] * x["top_k"] * x["hidden_size"]
    return np.zeros_like(num_bytes), num_bytes


_COMPUTE: dict[str, Callable[[Coordinates, float], tuple[Floats, Floats]]] = {
    "gemm": _gemm,
    "grouped_gemm": _grouped_gemm,
    "mla_bmm_pre": _mla_bmm,
    "mla_bmm_post": _mla_bmm,
    "context_attention": _context_attention,
    "generation_attention": _generation_attention,
    "context_mla": _context_mla,
    "generation_mla": _generation_mla,
    "dispatch": _exchange,
    "combine": _exchange,
}

_WIRE: dict[str, Callable[[Floats], Floats]] = {
    "all_reduce": lambda gpus: 2 * (gpus - 1) / gpus,
    "all_gather": lambda gpus: (gpus - 1) / gpus,
    "reduce_scatter": lambda gpus: (gpus - 1) / gpus,
    "all_to_all": lambda gpus: (gpus - 1) / gpus,
}
"""Share of the message that crosses each device's link (NCCL's bus bandwidth)."""


def work(op: str, dtype: str, coordinates: Coordinates) -> tuple[Floats, Floats]:
    """FLOP and bytes of each call, [M] each, of arithmetic on one device or of a link in the case of a collective.

    An operator that is not known here moves as many bytes as the product of its coordinates.
    """
    if op in ("moe", "wideep_moe"):
        return _moe(coordinates, dtype)
    if op in _COMPUTE:
        return _COMPUTE[op](coordinates, weight_bytes(dtype))
    if op in _WIRE:
        num_bytes = coordinates["message_bytes"] * _WIRE[op](coordinates["num_gpus"])
        return np.zeros_like(num_bytes), num_bytes
    product = np.prod(np.broadcast_arrays(*coordinates.values()), axis=0, dtype=np.float64)
    return np.zeros_like(product), product
