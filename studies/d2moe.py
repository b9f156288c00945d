"""D2MoE (arXiv 2504.15299): a width in bits for each token, and nested planes that travel hottest first.

Question: what does it bring that a token's expert is read at the width it needs, and that planes travel in the order
of how many tokens wait for them?

Setting: LLaMA-MoE-3.5B (32 layers of 16 experts of 4096 x 688, top-4) fed from a disk of 3.5 GB/s, 4 to 32 requests
at once; widths of 2, 3 and 4 bits for 30, 40 and 30 % of the tokens. Routing is made up: uniform choices, since its
trace is not public. The laptop's seconds of a token in one expert are not at hand: they follow from its rate with
everything in memory, 94.3 tokens a second at 32 requests, if that is all that a token takes.

Lever: planes of the widths that are needed, against whole experts of 4 bits; hottest first, against expert by expert.

Expected before the first run: hottest first brings a few percent, since the disk is the bottleneck for most batches;
widths bring the bits that they save, less at many requests, some of which need every plane.

Cannot speak about: its absolute rates, which rest on a memory budget over layers; quality; the second router.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.policies.planes import ByExpert, HottestExpertBitFirst, makespan_s
from moesim.study import Claim

LAYERS, EXPERTS, K, PARAMS = 32, 16, 4, 3 * 4096 * 688
DISK_BYTES_PER_S, SHARES = 3.5e9, (0.3, 0.4, 0.3)
IN_MEMORY, MOST = 94.3, 32
PLANES_S = np.array([2.0, 1.0, 1.0]) / 8 * PARAMS / DISK_BYTES_PER_S
"""Of 2 bits, and of one more each."""
TOKEN_S = 1 / IN_MEMORY / LAYERS / K
"""Of one token in one expert."""


def batch_EB(requests: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Tokens of a layer by expert and width."""
    chosen = rng.random((requests, EXPERTS)).argpartition(K, axis=1)[:, :K].ravel()
    width = rng.choice(3, chosen.size, p=SHARES)
    return np.bincount(chosen * 3 + width, minlength=EXPERTS * 3).reshape(EXPERTS, 3)


def layer_s(requests: int, order: ByExpert | HottestExpertBitFirst, is_whole: bool = False) -> float:
    """Mean of many batches; `is_whole`: every token at 4 bits."""
    rng, found = np.random.default_rng(requests), []
    for _ in range(100):
        tokens_EB = batch_EB(requests, rng)
        if is_whole:
            tokens_EB = np.stack([0 * tokens_EB[:, 0], 0 * tokens_EB[:, 0], tokens_EB.sum(axis=1)], axis=1)
        found.append(makespan_s(order.order(tokens_EB), tokens_EB, PLANES_S, TOKEN_S))
    return float(np.mean(found))


def claims() -> list[Claim]:
    """Gains of order and widths."""
    batches = (4, 8, 16, 32)
    order = [layer_s(n, ByExpert()) / layer_s(n, HottestExpertBitFirst()) for n in batches]
    widths = [layer_s(n, ByExpert(), True) / layer_s(n, ByExpert()) for n in batches]
    whole = "against 4-bit experts in one piece, with nothing kept from layer to layer; the published one "
    whole += "is slower, as it has separate copies of each width"
    disk = "the disk is the bottleneck at every batch here, and an order of planes hides only what is computed last"
    return [
        Claim("hottest first over expert by expert, least", "ablation", 1.11, min(order), "ratio", 0.05, because=disk),
        Claim("hottest first over expert by expert, most", "ablation", 1.21, max(order), "ratio", 0.05, because=disk),
        Claim("nested widths, least", "ablation", 1.91, min(widths), "ratio", 0.2, because=whole),
        Claim("nested widths, most", "ablation", 4.95, max(widths), "ratio", 0.2, because=whole),
        *(
            Claim(f"nested widths, {n} requests", "not at hand", None, gain, "ratio")
            for n, gain in zip(batches, widths, strict=True)
        ),
    ]
