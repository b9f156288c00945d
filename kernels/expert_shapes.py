"""Shapes of the routed experts of one layer: FLOP, bytes, inputs and cases that all expert kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moesim.kernels.tiles import Tile


@dataclass(frozen=True)
class ExpertsShape:
    """T tokens choose `top_k` of `num_experts` SwiGLU experts of width I on hidden size H."""

    name: str
    num_tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    width: int


def flops(shape: ExpertsShape) -> int:
    """Three matrix products per slot, a multiply-add is 2; padding, the activation and the combine not counted."""
    return 6 * shape.num_tokens * shape.top_k * shape.hidden_size * shape.width


def num_bytes(shape: ExpertsShape, num_active: int, weight_bytes_per_param: float, activation_bytes: int = 2) -> float:
    """Least memory traffic of the two products.

    Each active expert's weights are read once, token rows once, the gated rows written and read once per slot, and
    the output rows written once per slot.
    """
    weights = 3 * num_active * shape.hidden_size * shape.width * weight_bytes_per_param
    slots = shape.num_tokens * shape.top_k
    rows = shape.num_tokens * shape.hidden_size + slots * (2 * shape.width + shape.hidden_size)
    return weights + rows * activation_bytes


def expected_active(shape: ExpertsShape) -> float:
    """Experts that get at least one token when all choices are equally likely: E (1 - (1 - K/E)^T)."""
    return float(shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** shape.num_tokens))


@dataclass(frozen=True)
class ExpertsInputs:
    """One layer's tensors: weights as Hugging Face keeps them, gate rows first, then up rows."""

    x_TH: torch.Tensor
    gate_up_EJH: torch.Tensor  # J = 2 x width
    down_EHI: torch.Tensor
    expert_TK: torch.Tensor
    weight_TK: torch.Tensor


def make_inputs(
    shape: ExpertsShape, dtype: torch.dtype, device: str = "cpu", seed: int = 0, skew: float = 0.0
) -> ExpertsInputs:
    """Random tensors; expert e is chosen with weight (e + 1)^-skew, without replacement."""
    draw = torch.Generator(device).manual_seed(seed)
    T, E, H, width = shape.num_tokens, shape.num_experts, shape.hidden_size, shape.width

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=draw, device=device) * scale).to(dtype)

    # Gumbel noise on log-weights: the K largest are a draw without replacement.
    noise_TE = -torch.log(-torch.log(torch.rand((T, E), generator=draw, device=device).clamp(1e-9, 1 - 1e-7)))
    score_TE = noise_TE - skew * torch.log(torch.arange(1, E + 1, device=device))
    weight_TK = torch.rand((T, shape.top_k), generator=draw, device=device)
    return ExpertsInputs(
        normal(T, H),
        normal(E, 2 * width, H, scale=H**-0.5),
        normal(E, H, width, scale=width**-0.5),
        score_TE.topk(shape.top_k).indices.to(torch.int32).contiguous(),
        weight_TK / weight_TK.sum(1, keepdim=True),
    )


def reference(inputs: ExpertsInputs) -> torch.Tensor:
    """The layer's output [T, H] in float64, one expert after another, from the tensors as they are stored."""
    x_TH, weight_TK = inputs.x_TH.double(), inputs.weight_TK.double()
    out_TH = torch.zeros_like(x_TH)
    for e in range(inputs.gate_up_EJH.shape[0]):
        token, k = torch.where(inputs.expert_TK == e)
        gate, up = (x_TH[token] @ inputs.gate_up_EJH[e].double().T).chunk(2, dim=1)
        y = (torch.nn.functional.silu(gate) * up) @ inputs.down_EHI[e].double().T
        out_TH.index_add_(0, token, y * weight_TK[token, k, None])
    return out_TH


def candidate_tiles(rows_per_expert: float, capability: int = 90) -> tuple[Tile, ...]:
    """Tiles worth timing for that many rows per expert; the first is the default.

    All hold their accumulators in registers on that architecture (`moesim.kernels.compiled`). None has been timed.
    """
    if rows_per_expert <= 16:
        sizes = ((16, 64, 128, 1, 4, 4), (16, 32, 128, 1, 4, 5), (16, 64, 256, 1, 4, 3), (16, 128, 64, 1, 4, 5))
    elif rows_per_expert <= 64:
        sizes = ((64, 128, 64, 4, 8, 4), (64, 64, 128, 4, 4, 3), (64, 64, 64, 4, 4, 5), (32, 64, 128, 4, 4, 4))
    else:
        sizes = ((128, 64, 64, 8, 8, 4), (64, 128, 64, 16, 8, 4), (128, 64, 32, 8, 8, 5), (64, 64, 64, 16, 4, 5))
        if capability >= 90:
            sizes = ((128, 128, 64, 8, 8, 3), *sizes)
    return tuple(Tile(*size) for size in sizes)


#: Published models: (name, top_k, num_experts, hidden_size, width), from their config.json.
MODELS = (
    ("mixtral-8x7b", 2, 8, 4096, 14336),
    ("olmoe-1b-7b", 8, 64, 2048, 1024),
    ("qwen3-30b-a3b", 8, 128, 2048, 768),
    ("deepseek-v3", 8, 256, 7168, 2048),
)

CASES = tuple(
    ExpertsShape(f"{name}/{tokens}", tokens, *sizes) for name, *sizes in MODELS for tokens in (1, 16, 64, 512, 4096)
)
