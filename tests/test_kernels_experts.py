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
