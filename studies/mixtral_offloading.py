"""mixtral-offloading (arXiv 2312.17238): an LRU of experts on the GPU, and guesses of the next layer's.

Question: what do a small cache and one-layer guesses bring to Mixtral-8x7B on GPUs that cannot hold it?

Setting: one request; experts of 2 bits (2.6 in effect, 57 MB) in host memory, 2 of 8 of each layer on the RTX 3060
and 4 on the others. The naive row (all experts of a layer copied) gives each link's bytes a second, the row without
cache and guesses the fixed part of a token. Routing is made up: no trace of Mixtral is public. Its stickiness is what
gives an LRU of 2 of 8 the hit ratio that HybriMoE (arXiv 2504.05897) reports, 30.2 %; guesses are as right, layer by
layer, as AdapMoE (arXiv 2408.10284) measured.

Lever: LRU; LRU and guesses; on four GPUs.

Expected before the first run: both rows within a fifth on all GPUs. Guesses hide all they hit, since a layer's fixed
part is longer than the two copies; the paper's hide less on the faster GPUs, whose fixed part is shorter.

Cannot speak about: 3 bits, whose half of the table is not at hand (predicted below, from the 2-bit constants and
3.3 bits); quality.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from moesim.files.models import load_model
from moesim.offload.replay import PolicySet, UnitTimes, replay
from moesim.policies.cache import LRU, SlotsByLoads
from moesim.policies.predictor import OracleStated
from moesim.policies.prefetch import NoPrefetch, Speculative
from moesim.routing.synthetic import sticky_trace
from moesim.study import Claim

TABLE = {
    "A100": (3.061, 2.918, 2.265, 1.392),
    "3080 Mobile": (2.655, 2.227, 1.758, 1.059),
    "3060": (2.278, 2.051, 1.547, 0.919),
    "T4": (2.092, 1.567, 1.168, 0.661),
}
"""Tokens a second: all of it, without guesses, without guesses and cache, naive; 2 bits."""
EXPERT_PARAMS = 3 * 4096 * 14336
BITS = {2: 2.6, 3: 2.6 + 8 * (21.37e9 - 17.54e9) / (256 * EXPERT_PARAMS)}
"""Bits for each parameter in effect; those of 3 bits from the two published sizes."""
LRU_OF_2 = 0.302
STICKINESS = (LRU_OF_2 - 0.25) / 0.75
TOKENS = 60


def expert_bytes(bits: int) -> float:
    """Of one expert."""
    return EXPERT_PARAMS * BITS[bits] / 8


def link_bytes_per_s(gpu: str) -> float:
    """If the naive row is nothing but 256 experts for each token."""
    return 256 * expert_bytes(2) * TABLE[gpu][3]


def fixed_s(gpu: str) -> float:
    """What a token takes besides the copies of 64 experts, from the row without cache and guesses."""
    return 1 / TABLE[gpu][2] - 64 * expert_bytes(2) / link_bytes_per_s(gpu)


@cache
def tokens_per_s(gpu: str, guesses: bool, caches: bool = True, bits: int = 2) -> float:
    """Decoding of one request."""
    trace = sticky_trace(32, 8, 2, stickiness=STICKINESS, num_tokens=TOKENS)
    predictor = OracleStated((1.0,), SlotsByLoads().accuracy_L)
    policies = PolicySet(LRU(), predictor, Speculative() if guesses else NoPrefetch())
    slots = 32 * (2 if gpu == "3060" else 4) if caches else 0
    times = UnitTimes(expert_bytes(bits), link_bytes_per_s(gpu))
    rows = [np.array([t]) for t in range(TOKENS)]
    found = replay(trace, rows, times, slots, policies, layer_s=fixed_s(gpu) / 32)
    return 1 / float(found.seconds_S[5:].mean())


def model_bytes(bits: int) -> float:
    """Attention and router in 4 bits with scales (4.5), embeddings and head in 16, experts in `bits`."""
    model = load_model("mixtral-8x7b")
    embeddings = 2 * model.vocab_size * model.hidden_size
    rest = model.num_params - 256 * EXPERT_PARAMS - embeddings
    return 256 * expert_bytes(bits) + rest * 4.5 / 8 + 2 * embeddings


def claims() -> list[Claim]:
    """Two rows on four GPUs, the rows that they rest on, and the other half of the table."""
    found = []
    where = "table 2, 2-bit experts"
    for gpu, (whole, cached, bare, naive) in TABLE.items():
        found += [
            Claim(f"{gpu}: naive", where, naive, link_bytes_per_s(gpu) / (256 * expert_bytes(2)), "tokens_per_s", 0.01,
                  fitted=f"{link_bytes_per_s(gpu) / 1e9:.1f} GB/s"),
            Claim(f"{gpu}: no cache, no guesses", where, bare, tokens_per_s(gpu, False, False), "tokens_per_s", 0.01,
                  fitted=f"{1e3 * fixed_s(gpu):.0f} ms for each token"),
            Claim(f"{gpu}: cache", where, cached, tokens_per_s(gpu, False), "tokens_per_s", 0.2),
            Claim(f"{gpu}: cache and guesses", where, whole, tokens_per_s(gpu, True), "tokens_per_s", 0.2),
        ]  # fmt: skip
    for gpu in TABLE:
        for name, guesses in (("cache", False), ("cache and guesses", True)):
            ours = tokens_per_s(gpu, guesses, bits=3)
            found.append(Claim(f"{gpu}, 3 bits: {name}", "table 2, 3-bit experts", None, ours, "tokens_per_s"))
    sizes = "the size with 3 bits gives their bits"
    found += [
        Claim("4-bit attention, 2-bit experts", "section 3.3", 17.54e9, model_bytes(2), "bytes", 0.1),
        Claim("4-bit attention, 3-bit experts", "section 3.3", 21.37e9, model_bytes(3), "bytes", 0.1, fitted=sizes),
    ]
    return found
