"""The kernels as an experts implementation of Hugging Face transformers.

>>> register()                                             # doctest: +SKIP
>>> model.set_experts_implementation("moesim_triton")      # doctest: +SKIP

Serves the families whose experts are gate/up matrices [E, 2I, H] and down matrices [E, H, I] with SiLU and no bias
(Mixtral, OLMoE, Qwen2/3-MoE, DeepSeek-V2/V3, GLM-4-MoE and others); says what is missing for the rest. Forward only.
"""

from __future__ import annotations

from typing import Any

import torch
from moesim.kernels import grouped_gemm, grouped_gemm_decode
from moesim.kernels.expert_shapes import ExpertsInputs

NAME = "moesim_triton"

#: At most this many rows per expert on average go to the kernel that streams weights. A guess until a GPU has timed it.
DECODE_ROWS_PER_EXPERT = 4


def check_module(module: Any) -> None:
    """Refuses experts that the kernels do not compute.

    Raises:
        ValueError: names the class and each property that differs.
    """
    activation = type(getattr(module, "act_fn", None)).__name__
    wrong = [
        reason
        for reason, is_so in (
            ("experts without a gate", not module.has_gate),
            ("biases", module.has_bias),
            ("transposed weights", module.is_transposed),
            ("interleaved gate and up rows", not module.is_concatenated),
            ("a norm after the experts", module.has_post_expert_norm),
            (f"activation {activation}, not SiLU", activation not in ("SiLU", "SiLUActivation")),
            ("a gate of its own", type(module)._apply_gate.__module__ != "transformers.integrations.moe"),
        )
        if is_so
    ]
    if wrong:
        raise ValueError(
            f"{type(module).__name__}: {NAME} does not serve {', '.join(wrong)}; use experts_implementation eager"
        )


def experts_forward(
    module: Any, hidden_TH: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """What transformers calls in place of an experts module's forward; ids of other ranks' experts add nothing."""
    check_module(module)
    inputs = ExpertsInputs(
        hidden_TH.contiguous(), module.gate_up_proj, module.down_proj, expert_TK.contiguous(), weight_TK.contiguous()
    )
    few = expert_TK.numel() <= DECODE_ROWS_PER_EXPERT * module.gate_up_proj.shape[0]
    with torch.no_grad():
        return (grouped_gemm_decode if few else grouped_gemm).experts(inputs)


def register() -> None:
    """Makes `moesim_triton` known to `model.set_experts_implementation`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
