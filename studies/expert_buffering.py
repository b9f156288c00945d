"""Towards MoE Deployment (arXiv 2303.06182): expert buffering, a cache whose last-used inactive expert leaves first.

Question: how much memory does a cache of experts save, and which of them should leave?

Setting: the decoder of the translation model: 24 layers of width 2048, 128 experts of width 8192 in every fourth,
over 8 GPUs, 16 bits. Its routing is not public: hits are those of the packaged trace of a small trained model,
batches of 2 answers, which leave four fifths of the experts idle, in turn, a quarter to three quarters of the experts
in the cache.

Lever: experts in a GPU's cache (10 of its 16), and LIFO of inactive experts against LRU and Belady.

Expected before the first run: the bytes saved within a tenth. LIFO is not better than LRU on this trace, whose
consecutive tokens share experts.

Cannot speak about: the gains of rebalancing, for which its data's expert loads are needed; latencies.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from moesim.files.scenarios import load_trace
from moesim.offload.hits import hit_rates_C
from moesim.policies.cache import LIFO, LRU, OracleBelady
from moesim.routing.reuse import decode_in_step
from moesim.study import Claim

HIDDEN, WIDTH, LAYERS, EXPERTS, GPUS, KEPT = 2048, 8192, 6, 128, 8, 10


def expert_bytes() -> float:
    """Two matrices in 16 bits."""
    return 2.0 * 2 * HIDDEN * WIDTH


def saved_bytes() -> float:
    """On each GPU, of all MoE layers of the decoder."""
    return (EXPERTS // GPUS - KEPT) * LAYERS * expert_bytes()


@cache
def hits_C(policy: LRU | LIFO | OracleBelady) -> NDArray[np.float64]:
    """With a quarter, half and three quarters of the experts."""
    trace = load_trace("olmoe-shape-16x64")
    rows = list(decode_in_step(trace, 2)[:300])
    slots = [trace.num_layers * trace.num_experts * q // 4 for q in (1, 2, 3)]
    return hit_rates_C(trace, rows, policy, slots)


def claims() -> list[Claim]:
    """Memory, and hits."""
    active = (
        "consecutive tokens of this trace share experts: what was used last is used again soonest, and LIFO drops it"
    )
    lifo, lru, best = hits_C(LIFO()), hits_C(LRU()), hits_C(OracleBelady())
    return [
        Claim("bytes saved on each GPU, 10 experts kept", "section 7", 2.25e9, saved_bytes(), "bytes", 0.1),
        Claim("LIFO's hits over LRU's, half of the experts", "figure 12", "> 1", float(lifo[1] / lru[1]), "ratio",
              because=active),
        Claim("LIFO's hits over Belady's, half of the experts", "figure 12", "<= 1", float(lifo[1] / best[1]), "ratio"),
    ]  # fmt: skip
