"""MoNDE (arXiv 2405.18832): cold experts are computed beside their memory, hot ones on the GPU.

Question: when activations travel in place of weights, how much faster is an MoE layer than with weights copied on
demand?

Setting: one A100 on 32 GB/s to an expander of 512 GB/s with 2.05 TFLOP/s beside it, all experts there;
Switch-Large-128 and NLLB's sizes (128 experts of 2048 x 8192, top-2) in 16 bits. Neither model's routing is public:
popularity is Zipf's, exponent 1 in the encoder, whose batch is 512 tokens, and in the decoder, whose batch is 4. What
the GPU does in a layer besides experts is assumed to be 0.3 ms.

Lever: copies on demand, or the split that ends on both sides at once.

Expected before the first run: the decoder gains what the bandwidths allow less the GPU's own work, and more than
published; the encoder less than published, since the unit computes 4 tokens an expert before it is slower than it
reads (it came out higher: with Zipf's skew most experts have few tokens).

Cannot speak about: the workloads of its maxima, which are not at hand; the follow-up's 3-bit weights, energy, area.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from moesim.files.hardware import load_cluster
from moesim.offload.replay import PolicySet, UnitTimes, replay
from moesim.policies.executor import HotCold, OnDemand
from moesim.routing.synthetic import zipf_trace
from moesim.study import Claim

MODELS = {"Switch-Large-128": (2 * 1024 * 4096, 1), "NLLB-MoE": (2 * 2048 * 8192, 2)}
"""Parameters of an expert, and experts for each token."""
BATCHES = {"encoder": 512, "decoder": 4}
LAYERS, EXPERTS, LAYER_S, STEPS = 6, 128, 0.3e-3, 6
BOX = load_cluster("monde-a100")


def times(model: str) -> UnitTimes:
    """Of that model's experts."""
    params, _ = MODELS[model]
    assert BOX.near is not None
    gpu = BOX.device.memory.bytes_per_s * BOX.device.efficiency["memory"].value
    return UnitTimes(
        2.0 * params, BOX.host_link.bytes_per_s, gpu_expert_s=2 * params / gpu,
        near_expert_s=2 * params / BOX.near.memory.bytes_per_s, near_token_s=2 * params / BOX.near.flops_per_s["bf16"],
        hop_s=10e-6, flops_per_byte=1.0,
    )  # fmt: skip


@cache
def step_s(model: str, part: str, executor: OnDemand | HotCold) -> float:
    """Of the MoE layers of one batch."""
    tokens = BATCHES[part]
    trace = zipf_trace(
        LAYERS, EXPERTS, MODELS[model][1], num_requests=STEPS, prompt_tokens=tokens, output_tokens=0, exponent=1.0
    )
    rows = np.split(np.arange(trace.num_tokens), STEPS)
    found = replay(trace, rows, times(model), 0, PolicySet(executor=executor), layer_s=LAYER_S)
    return float(found.seconds_S.mean())


def gain(model: str, part: str) -> float:
    """On demand over split."""
    return step_s(model, part, OnDemand()) / step_s(model, part, HotCold())


def claims() -> list[Claim]:
    """Gains, and the figures that they follow from."""
    mixtral = 2 * 3 * 4096 * 14336
    assert BOX.near is not None
    reads, computes = mixtral / BOX.near.memory.bytes_per_s, mixtral / BOX.near.flops_per_s["bf16"]
    bare = (
        "little but experts is in a layer here, and the gain comes near 512 over 32 GB/s; its batches and what else it "
    )
    bare += "computes in a layer are not at hand"
    found = [
        Claim("Mixtral expert beside its memory", "[calc]", 0.69e-3, reads, "s", 0.01),
        Claim("the same copied", "[calc]", 11e-3, mixtral / BOX.host_link.bytes_per_s, "s", 0.01),
        Claim("tokens at which a copy is as fast", "[calc]", 64.0, mixtral / 32e9 / computes, "", 0.05),
        Claim("encoder, maximum of both models", "abstract", 7.5, max(gain(m, "encoder") for m in MODELS), "ratio", 0.2,
              because=bare),
        Claim("decoder, maximum of both models", "abstract", 3.7, max(gain(m, "decoder") for m in MODELS), "ratio", 0.2,
              because=bare),
    ]  # fmt: skip
    return found + [
        Claim(f"{model}, {part}", "not at hand", None, gain(model, part), "ratio")
        for model in MODELS
        for part in BATCHES
    ]
