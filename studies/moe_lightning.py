"""MoE-Lightning (arXiv 2411.11217): attention on the CPU, weights streamed in pages between hidden states.

Question: how do tokens a second grow with the length of answers when weights are streamed, and how much is lost to
padding?

Setting: Mixtral-8x7B in 16 bits on one T4 (S1), 12 GB/s to the host (three quarters of PCIe 3.0), 192 GB of host
memory; MTBench: prompts of 77 tokens in the mean, of 418 padded. Two constants of the padded system, its sequences in
a batch and the FLOP/s that its prefill reaches, follow from answers of 32 and of 128. Each other system has one of
its own, its sequences, from answers of 128, where the paper's table 5 and the plot agree.

Lever: FlexGen, FlexGen with attention on the CPU (c), DeepSpeed ZeRO-Inference, MoE-Lightning with padded prompts (p)
and whole; answers of 32 to 256.

Expected before the first run: both MoE-Lightnings within a fifth at the lengths that were not fitted. FlexGen and
DeepSpeed grow with the answer's length here, as prefill is shared by more tokens; published values fall instead.

Cannot speak about: S2, S6 and S7, whose values are not at hand, and HELM; how its batch sizes came about.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from moesim.costs.streaming import Streams
from moesim.files.models import load_model
from moesim.policies.batching import FlexGen, Job, ModelLevel, MoELightning
from moesim.study import Claim, bisected

ANSWERS = (32.0, 64.0, 128.0, 256.0)
TABLE = {
    "(p)": (15.6, 24.0, 30.1, 33.9),
    "whole": (63.0, 101.3, 97.7, 96.7),
    "FlexGen": (12.1, 12.3, 9.5, 9.6),
    "FlexGen (c)": (9.8, 9.4, 7.2, 6.8),
    "DeepSpeed": (7.1, 7.6, 7.8, 6.7),
}
"""Tokens a second on S1, MTBench."""
POLICIES = {
    "(p)": MoELightning(), "whole": MoELightning(), "FlexGen": FlexGen(), "FlexGen (c)": MoELightning(),
    "DeepSpeed": ModelLevel(),
}  # fmt: skip
PADDED, MEAN = 418.0, 77.0
FALLING = (
    ("FlexGen", 32.0), ("FlexGen", 64.0), ("FlexGen (c)", 32.0), ("FlexGen (c)", 64.0), ("DeepSpeed", 256.0),
)  # fmt: skip


def streams(prefill_flops_per_s: float) -> Streams:
    """S1."""
    model = load_model("mixtral-8x7b")
    return Streams(
        model.weight_bytes, model.kv_bytes_per_token, 2 * model.num_active_params, 12e9, prefill_flops_per_s,
        cpu_kv_bytes_per_s=0.7 * 100e9, host_bytes=192e9,
    )  # fmt: skip


def tokens_per_s(system: str, answer: float, sequences: float, prefill_flops_per_s: float) -> float:
    """Generated, prefill included."""
    job = Job(MEAN if system == "whole" else PADDED, answer, sequences)
    box = streams(prefill_flops_per_s)
    return POLICIES[system].plan(box, job).tokens_per_s(box, job)


def fitted_sequences(system: str, answer: float, paper: float, prefill_flops_per_s: float) -> float:
    """Sequences in a batch that give a cell, by bisection."""
    return bisected(lambda x: tokens_per_s(system, answer, x, prefill_flops_per_s) < paper, 1.0, 1e5, 45)[0]


@cache
def fitted() -> tuple[float, float]:
    """Sequences of (p) and its prefill's FLOP/s, which give answers of 32 and 128."""
    low, high = 1e12, 65e12
    for _ in range(30):
        flops = (low * high) ** 0.5
        sequences = fitted_sequences("(p)", 128.0, TABLE["(p)"][2], flops)
        low, high = (flops, high) if tokens_per_s("(p)", 32.0, sequences, flops) < TABLE["(p)"][0] else (low, flops)
    return sequences, flops


def claims() -> list[Claim]:
    """The table, and padding."""
    sequences, flops = fitted()
    found = []
    falls = (
        "its batch is smaller where answers are longer (9.5 to 12 tokens/s in all), which the fitted sequences are not"
    )
    for system, papers in TABLE.items():
        mine = sequences if system == "(p)" else fitted_sequences(system, 128.0, papers[2], flops)
        for answer, paper in zip(ANSWERS, papers, strict=True):
            is_fitted = answer == 128.0 or (system, answer) == ("(p)", 32.0)
            ours = tokens_per_s(system, answer, mine, flops)
            constants = f"{mine:.0f} sequences" + (f", {flops / 1e12:.1f} TFLOP/s" if system == "(p)" else "")
            found.append(
                Claim(f"{system}, answers of {answer:.0f}", "artifact, S1, MTBench", paper, ours, "tokens_per_s", 0.2,
                      fitted=constants if is_fitted else "",
                      because=falls if (system, answer) in FALLING else "")
            )  # fmt: skip
    faster = replace(streams(flops), link_bytes_per_s=16e9)
    job = Job(MEAN, 128.0, fitted_sequences("whole", 128.0, TABLE["whole"][2], flops))
    other = MoELightning().plan(faster, job).tokens_per_s(faster, job)
    found.append(Claim("whole, answers of 128, over 16 GB/s", "not in the paper", None, other, "tokens_per_s"))
    return found
