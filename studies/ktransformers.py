"""kTransformers (SOSP 2025) and Fiddler (arXiv 2402.07033): experts computed by the CPU.

Question: how fast does DeepSeek-V3 decode when its routed experts stay in the memory of two sockets, and what do NUMA
awareness and deferred experts bring?

Setting: one A100 40 GB and two Xeon 8452Y, 220 GB/s to each socket's own memory and 125 GB/s to the other's, as the
paper measured; 58 layers of 256 experts in 16 bits (88 MB), 8 for a token, none on the GPU. What the GPU does in a
layer is 28 % of the published time, its published share. Routing does not matter, as no expert is cached.

Lever: kTransformers without and with deferral (half of a layer's experts end during the next); Fiddler's unaware
code.

Expected before the first run: decoding within a fifth; deferral brings more than published, since it overlaps
all that it can here.

Cannot speak about: prefill; quantized models, whose kernels are limited by other things than memory; hit ratios of
Fiddler's placement, for which Mixtral's routing of its prompts is needed.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from moesim.offload.prices import NUMA_BLIND
from moesim.offload.replay import PolicySet, Replayed, UnitTimes, replay
from moesim.policies.cache import Popular
from moesim.policies.executor import Fiddler, KTransformers, KTransformersDeferred
from moesim.routing.synthetic import sticky_trace
from moesim.study import Claim

LAYERS, EXPERTS, K = 58, 256, 8
EXPERT_BYTES = 2 * 3 * 7168 * 2048
LOCAL_BYTES_PER_S, REMOTE_BYTES_PER_S = 220e9, 125e9
TOKENS_PER_S, GPU_SHARE, CPU_SHARE = 5.87, 0.28, 0.74
GPU_S = GPU_SHARE / TOKENS_PER_S / LAYERS
"""In a layer."""


@cache
def decoded(executor: KTransformers | Fiddler, numa_aware: bool = True) -> Replayed:
    """A few tokens."""
    rate = 2 * LOCAL_BYTES_PER_S * (1.0 if numa_aware else NUMA_BLIND)
    times = UnitTimes(EXPERT_BYTES, 0.75 * 32e9, 50e-6, cpu_expert_s=EXPERT_BYTES / rate, host_bytes_per_s=rate)
    trace = sticky_trace(LAYERS, EXPERTS, K, stickiness=0.0, num_tokens=12)
    rows = [np.array([t]) for t in range(12)]
    return replay(trace, rows, times, 0, PolicySet(cache=Popular(), executor=executor), layer_s=GPU_S)


def tokens_per_s(executor: KTransformers | Fiddler, numa_aware: bool = True) -> float:
    """After the first ones."""
    return 1 / float(decoded(executor, numa_aware).seconds_S[2:].mean())


def busy(executor: KTransformers | Fiddler, unit: str) -> float:
    """Share of the time that a unit works in."""
    found = decoded(executor)
    return found.busy_s[unit] / float(found.seconds_S.sum())


def claims() -> list[Claim]:
    """Rates, use, gains."""
    plain, deferred = KTransformers(), KTransformersDeferred()
    where = "section 6, DeepSeek-V3 BF16, A100"
    aware = decoded(plain).busy_s["cpu"] / decoded(plain, False).busy_s["cpu"]
    all_of_it = "half of the experts are deferred here, so that nothing waits; how many were is not at hand"
    reached = "experts get all of the measured bandwidth here; 74 % of 5.87 tokens/s is three quarters of it"
    return [
        Claim("decoding", where, TOKENS_PER_S, tokens_per_s(plain), "tokens_per_s", 0.2, because=reached),
        Claim("use of the CPU", where, CPU_SHARE, busy(plain, "cpu"), "fraction", 0.2),
        Claim("use of the CPU, deferred", where, 1.0, busy(deferred, "cpu"), "fraction", 0.1),
        Claim("use of the GPU, deferred", where, 0.37, busy(deferred, "compute"), "fraction", 0.2, because=all_of_it),
        Claim("gain of deferral", where, 1.33, tokens_per_s(deferred) / tokens_per_s(plain), "ratio", 0.2),
        Claim("gain of NUMA-aware experts, maximum", "figure 13", 1.63, 1 / aware, "ratio", 0.2),
        Claim("Fiddler, decoding", where, 4.68, tokens_per_s(Fiddler(), False), "tokens_per_s", 0.2,
              because=reached),
        Claim("kTransformers over Fiddler", where, TOKENS_PER_S / 4.68,
              tokens_per_s(plain) / tokens_per_s(Fiddler(), False), "ratio", 0.2),
    ]  # fmt: skip
