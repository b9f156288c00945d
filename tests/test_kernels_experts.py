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


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("tokens", "skew"), [(1, 0.0), (19, 3.0)], ids=["one token", "skewed"])
@interpreted
def test_decode_matches_float64(splits, tokens, skew):
    from moesim.kernels.expert_shapes import reference
    from moesim.kernels.grouped_gemm_decode import experts
    from moesim.kernels.tiles import Tile

    inputs = small(tokens, skew=skew)
    close(experts(inputs, Tile(16, 64, 32), splits), reference(inputs), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("kernel", ["grouped_gemm", "grouped_gemm_decode"])
@interpreted
def test_all_on_one_expert_and_none_of_ours(kernel):
    import importlib
    from dataclasses import replace

    import torch
    from moesim.kernels.expert_shapes import reference
    from moesim.kernels.tiles import Tile

    experts = importlib.import_module(f"moesim.kernels.{kernel}").experts
    inputs = small(33, 64, 32, dtype="float32")
    one = replace(inputs, expert_TK=torch.full_like(inputs.expert_TK, 3))
    close(experts(one, Tile(16, 32, 64)), reference(one), 1e-5)
    none = replace(inputs, expert_TK=torch.full_like(inputs.expert_TK, 5))
    assert torch.equal(experts(none, Tile(16, 32, 64)), torch.zeros_like(inputs.x_TH))


@pytest.mark.parametrize("swiglu", [True, False])
@interpreted
def test_rows_of_unused_blocks_stay_untouched(swiglu):
    import torch
    from moesim.kernels.grouped_gemm import grouped_gemm
    from moesim.kernels.permute import permute
    from moesim.kernels.tiles import Tile

    inputs = small(9, 64, 32, dtype="float32")
    rows = permute(inputs.expert_TK, 5, 16)
    weights = inputs.gate_up_EJH if swiglu else inputs.gate_up_EJH[:, :32].contiguous()
    out = torch.full((rows.slot_P.numel(), 32), float("nan"))
    grouped_gemm(inputs.x_TH, weights, rows, Tile(16, 16, 32, persistent=False), gather=True, swiglu=swiglu, y_PN=out)
    used = int(rows.used) * 16
    assert used < out.shape[0]
    assert out[:used].isfinite().all()
    assert out[used:].isnan().all()


def test_flops_and_bytes_of_a_shape_one_can_count():
    pytest.importorskip("triton", reason="kernels need triton: moesim[kernels]")
    from moesim.kernels.expert_shapes import ExpertsShape, expected_active, flops, num_bytes

    shape = ExpertsShape("hand", 3, 2, 4, 10, 5)
    assert flops(shape) == 6 * (2 * 10 * 10 + 2 * 5 * 10)  # six slots: 10 -> 2 x 5 -> 10
    # Weights 3 x 2 active x 50 at half a byte, 3 rows of 10 in, 6 gated rows of 5 out and in, 6 rows of 10 out.
    assert num_bytes(shape, 2, 0.5) == 150 + 2 * (30 + 60 + 60)
    assert expected_active(shape) == 4 * (1 - 0.5**3)
