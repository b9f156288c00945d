"""Whole models of transformers through the kernels, in Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from triton_interpreter import interpreted

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": 5, "intermediate_size": 40},
    "Olmoe": {"num_experts": 6, "intermediate_size": 24},
    "Qwen3Moe": {"num_experts": 6, "moe_intermediate_size": 24, "intermediate_size": 48, "head_dim": 8},
}

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers: moesim[capture]")


@pytest.mark.parametrize("tokens", [3, 17], ids=["decode kernel", "grouped kernel"])
@pytest.mark.parametrize("family", FAMILIES)
@interpreted
def test_logits_match_the_librarys_own(family, tokens):
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from moesim.kernels import experts

        torch.manual_seed(1)
        config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        ids = torch.randint(0, 64, (1, tokens))
        model.set_experts_implementation("eager")
        with torch.no_grad():
            exact = model(ids).logits
        experts.register()
        calls = []
        forward = experts.check_module
        experts.check_module = lambda module: calls.append(forward(module))
        try:
            model.set_experts_implementation(experts.NAME)
            with torch.no_grad():
                logits = model(ids).logits
        finally:
            experts.check_module = forward
    assert len(calls) == 2
    assert not torch.equal(exact, torch.zeros_like(exact))
    torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-5)


@interpreted
def test_experts_with_biases_are_refused():
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from moesim.kernels import experts

        config = transformers.GptOssConfig(
            **SIZES, num_local_experts=4, intermediate_size=16, head_dim=8, layer_types=["full_attention"] * 2
        )
        model = transformers.GptOssForCausalLM(config)
        experts.register()
        model.set_experts_implementation(experts.NAME)
        with pytest.raises(ValueError, match="GptOssExperts: moesim_triton does not serve biases"):
            model(torch.zeros(1, 3, dtype=torch.long))
