"""MoE-Gen (arXiv 2503.09716): a batch for each module, so that every pass over the weights serves all of host memory.

Question: how many tokens a second does Mixtral-8x7B generate on one RTX A5000 whose weights are all in host memory,
by how batches are made?

Setting: 24 GB/s to the host (three quarters of PCIe 4.0), 512 GB of it, of which 94 GB are weights; prompts of 512
tokens, answers of 256 or 1024; decoding alone counts, as in the table. The share of attention on the CPU is the
paper's best, 60 %; balance at it gives the rate at which its CPU attends. Batches of the systems that it is compared
with are limited by their implementations: one cell of each (answers of 256) gives its sequences, the other one is
predicted.

Lever: model-level batching (DeepSpeed, FlexGen, MoE-Lightning), continuous batching (vLLM), module-level batching
with attention on the GPU (G) or shared with the CPU (H).

Expected before the first run: G and H from first principles within a fifth for answers of 256; for 1024 too, since
caches fill the same memory. The others hardly change with the answer's length, but vLLM, whose sequences are halved.

Cannot speak about: prefill, and the other three models, whose cells are not at hand: predictions below.
"""

from __future__ import annotations

from dataclasses import replace

from moesim.costs.streaming import Streams
from moesim.files.models import load_model
from moesim.policies.batching import Continuous, FlexGen, Job, ModelLevel, ModuleLevel, ModuleLevelGPU, MoELightning
from moesim.study import Claim, bisected

TABLE = {
    "vLLM": (31.0, 14.0),
    "DeepSpeed": (27.0, 26.0),
    "FlexGen": (33.0, 30.0),
    "MoE-Lightning": (89.0, 78.0),
    "MoE-Gen (G)": (195.0, 93.0),
    "MoE-Gen (H)": (469.0, 283.0),
}
"""Tokens a second with answers of 256 and 1024."""
PROMPT, ANSWERS = 512.0, (256.0, 1024.0)
CPU_SHARE = 0.6
LINK_BYTES_PER_S, HOST_BYTES = 24e9, 512e9
GPU_FLOPS_PER_S = 0.6 * 111e12
POLICIES = {
    "vLLM": Continuous(PROMPT + ANSWERS[0]), "DeepSpeed": ModelLevel(), "FlexGen": FlexGen(),
    "MoE-Lightning": MoELightning(), "MoE-Gen (G)": ModuleLevelGPU(), "MoE-Gen (H)": ModuleLevel(CPU_SHARE),
}  # fmt: skip


def streams(model_name: str = "mixtral-8x7b") -> Streams:
    """The testbed; its CPU attends at the rate that balances with the link at the published share."""
    model = load_model(model_name)
    plain = Streams(
        model.weight_bytes, model.kv_bytes_per_token, 2 * model.num_active_params, LINK_BYTES_PER_S, GPU_FLOPS_PER_S,
        host_bytes=HOST_BYTES,
    )  # fmt: skip
    if model_name != "mixtral-8x7b":
        return replace(plain, cpu_kv_bytes_per_s=streams().cpu_kv_bytes_per_s)
    job = Job(PROMPT, ANSWERS[0])
    kv_bytes = plain.host_sequences(job.longest) * job.context * plain.kv_bytes
    link_s = plain.streaming_s + (1 - CPU_SHARE) * kv_bytes / LINK_BYTES_PER_S
    return replace(plain, cpu_kv_bytes_per_s=CPU_SHARE * kv_bytes / link_s)


def tokens_per_s(system: str, answer: float, gpu_sequences: float = 1.0, model: str = "mixtral-8x7b") -> float:
    """Decoding alone."""
    box, job = streams(model), Job(PROMPT, answer, gpu_sequences)
    plan = POLICIES[system].plan(box, job)
    return plan.tokens_per_s(box, job, counts_prefill=False)


def fitted_sequences(system: str) -> float:
    """Sequences of a batch that give the cell with answers of 256, by bisection; it only grows with them."""
    return bisected(lambda x: tokens_per_s(system, ANSWERS[0], x) < TABLE[system][0], 1.0, 4000.0, 60)[0]


def claims() -> list[Claim]:
    """The table, and what it would be for other models."""
    found = []
    where = "table 6, Mixtral-8x7B, C2"
    caches = (
        "as if caches crossed the link at 16 GB/s, weights at 24: the longer the contexts, the more of a step they are"
    )
    for system, papers in TABLE.items():
        is_ours = system.startswith("MoE-Gen")
        sequences = 1.0 if is_ours else fitted_sequences(system)
        for answer, paper in zip(ANSWERS, papers, strict=True):
            ours = tokens_per_s(system, answer, sequences)
            is_fitted = not is_ours and answer == ANSWERS[0]
            fitted = f"{sequences:.0f} sequences in a batch" if is_fitted else ""
            found.append(
                Claim(f"{system}, answers of {answer:.0f}", where, paper, ours, "tokens_per_s", 0.2, fitted=fitted,
                      because=caches if (system, answer) == ("MoE-Gen (G)", 1024.0) else "")
            )  # fmt: skip
    found += [
        Claim(
            f"{model}, {system}, answers of 256",
            "table 6",
            None,
            tokens_per_s(system, 256.0, model=model),
            "tokens_per_s",
        )
        for model in ("mixtral-8x22b", "deepseek-v2")
        for system in ("MoE-Gen (G)", "MoE-Gen (H)")
    ]
    return found
