"""SE-MoE (arXiv 2205.10034): a ring of layers on the GPU; experts of layers further on are copied while it turns.

Question: how much GPU memory does the ring save, and what must a layer compute for it to cost nothing?

Setting: 48.2 billion parameters in 32 experts for each of 24 layers, spread over 16 A100 40 GB, 16 bits (the number
of layers is assumed); each GPU copies its share of a layer's experts from the host at three quarters of 32 GB/s. All
experts of a layer are copied, so that routing does not matter. A ring of 16 layers is taken, which saves a third of
the experts' memory.

Lever: layers in the ring; seconds that a layer computes, given as a share of what its copy takes.

Expected before the first run: a step costs what it does without the ring as long as a layer computes longer than its
experts are copied, and otherwise what the copies take.

Cannot speak about: the 30 % of memory that it saves, as the size of its ring is not at hand; its 13 % more tokens a
second, which are those of its kernels against another framework; training.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from moesim.offload.replay import PolicySet, UnitTimes, replay
from moesim.routing.synthetic import sticky_trace
from moesim.study import Claim

LAYERS, EXPERTS, GPUS, PARAMS = 24, 32, 16, 48.2e9
LINK_BYTES_PER_S = 0.75 * 32e9
RING = 16
PER_GPU = EXPERTS // GPUS
EXPERT_BYTES = 2 * PARAMS / LAYERS / EXPERTS
COPY_S = PER_GPU * EXPERT_BYTES / LINK_BYTES_PER_S
"""Of a GPU's share of a layer."""


@cache
def step_s(ring: int, computing: float) -> float:
    """Mean of some steps with so many layers in the ring; a layer computes that share of the time of its copy."""
    trace = sticky_trace(LAYERS, PER_GPU, PER_GPU, stickiness=0.0, num_tokens=12)
    times = UnitTimes(EXPERT_BYTES, LINK_BYTES_PER_S)
    rows = [np.array([t]) for t in range(12)]
    policies = PolicySet.of("se_moe" if ring < LAYERS else "on_demand")
    found = replay(trace, rows, times, ring * PER_GPU, policies, layer_s=computing * COPY_S)
    return float(found.seconds_S[4:].mean())


def slower(computing: float) -> float:
    """A step with the ring over one with all experts on the GPU."""
    return step_s(RING, computing) / step_s(LAYERS, computing)


def claims() -> list[Claim]:
    """Time and memory."""
    saved = (LAYERS - RING) * PER_GPU * EXPERT_BYTES
    return [
        Claim("step with the ring, layers that compute 1.2 times as long as a copy", "ring test", "1 to 1.05",
              slower(1.2), "ratio"),
        Claim("step with the ring, layers that compute half as long", "not at hand", None, slower(0.5), "ratio"),
        Claim("the least that a layer must compute", "not at hand", None, COPY_S, "s"),
        Claim("layers in the largest ring that saves 30 % of the experts' memory", "not at hand", None,
              float(int(0.7 * LAYERS)), ""),
        Claim("saved on each GPU", "not at hand", None, saved, "bytes"),
    ]  # fmt: skip
