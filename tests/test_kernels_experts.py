"""The experts' kernels against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
from triton_interpreter import interpreted

# Largest error allowed, as a share of the largest exact value: rounding of the stored rows, twice.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


def close(actual, exact, tolerance):
    import torch

    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "hidden", "width", "skew"),
    [(19, 2, 5, 64, 32, 0.0), (23, 3, 7, 72, 40, 1.5), (1, 1, 4, 32, 32, 0.0)],
    ids=["even", "odd sizes, skewed", "one token"],
)
@interpreted
def test_layer_matches_float64(dtype, tokens, top_k, num_experts, hidden, width, skew):
    import torch

    from moesim.kernels.expert_shapes import ExpertsShape, make_inputs, reference
    from moesim.kernels.grouped_gemm import experts
    from moesim.kernels.tiles import Tile

    shape = ExpertsShape("test", tokens, top_k, num_experts, hidden, width)
    inputs = make_inputs(shape, getattr(torch, dtype), seed=tokens, skew=skew)
    out = experts(inputs, Tile(16, 32, 64))
    close(out, reference(inputs), TOLERANCE[dtype])


def small(tokens=19, hidden=160, width=136, skew=1.5, dtype="bfloat16", seed=3):
    import torch

    from moesim.kernels.expert_shapes import ExpertsShape, make_inputs

    shape = ExpertsShape("test", tokens, 2, 5, hidden, width)
    return make_inputs(shape, getattr(torch, dtype), seed=seed, skew=skew)


def widened(q, scale):
    """fp8 rows and their group scales in float64."""
    return q.double() * scale.double().repeat_interleave(128, 1)[:, : q.shape[1]]


@interpreted
def test_fp8_stage_by_stage():
    import torch

    from moesim.kernels import grouped_gemm_fp8 as fp8
    from moesim.kernels.permute import combine_reference, permute
    from moesim.kernels.tiles import Tile

    inputs, tile = fp8.quantised(small()), Tile(16, 128, 128)
    exact = fp8.dequantised(inputs)
    rows = permute(inputs.expert_TK, 5, 16)
    real = torch.where(rows.slot_P < rows.row_TK.numel())[0]
    expert_P = rows.expert_B.repeat_interleave(16)[real].long()

    x, x_scale = fp8.quantise_rows(inputs.x_TH)
    # Half a step of e4m3 is at most 1/16 of the value, or 2^-10 below the smallest normal number.
    torch.testing.assert_close(widened(x, x_scale), inputs.x_TH.double(), rtol=0.0626, atol=1e-4)

    gated, gated_scale = fp8.grouped_gemm_fp8(x, x_scale, inputs.gate_up_EJH, inputs.gate_up_scale, rows, tile)
    gate, up = torch.einsum(
        "ph,pjh->pj", widened(x, x_scale)[rows.slot_P[real].long() // 2], exact.gate_up_EJH[expert_P]
    ).chunk(2, dim=1)
    gated_real = widened(gated[real], gated_scale[real])
    torch.testing.assert_close(gated_real, torch.nn.functional.silu(gate) * up, rtol=0.0626, atol=1e-3)

    y = torch.zeros(rows.slot_P.numel(), 160, dtype=torch.float64)
    y[real] = torch.einsum("pi,phi->ph", gated_real, exact.down_EHI[expert_P])
    close(fp8.experts(inputs, tile), combine_reference(y, rows, inputs.weight_TK), 0.01)


@pytest.mark.parametrize("group", [32, 64])
@interpreted
def test_int4_matches_dequantised_weights(group):
    from moesim.kernels import grouped_gemm_int4 as int4
    from moesim.kernels.expert_shapes import reference
    from moesim.kernels.tiles import Tile

    inputs = int4.quantised(small(hidden=3 * group, width=2 * group), group)
    close(int4.experts(inputs, Tile(16, 32, group)), reference(int4.dequantised(inputs)), TOLERANCE["bfloat16"])
