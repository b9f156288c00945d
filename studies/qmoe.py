"""QMoE (arXiv 2310.16795): ternary experts as code words of 16 bits.

Question: how small do trillion-parameter experts get when nearly all of their ternary weights are zero, and where do
they fit?

Setting: Switch Transformers base-128, large-128 and c2048, whose share of zeros after quantization is published
(85.7, 86.4 and 88.6 %); weights are taken to be independent, the other two values alike. The dictionary is the 2^16
likeliest sequences of at most 28 weights; weights are read by the longest word that fits.

Lever: the share of zeros, and with it the length of words.

Expected before the first run: the entropy bound exactly; compression of experts within a tenth, as row offsets and
scales are left out; sizes of whole models follow from their uncompressed ones.

Cannot speak about: speed of its kernels, for want of a GPU here; quality.
"""

from __future__ import annotations

import heapq
from functools import cache
from math import log2

import numpy as np

from moesim.study import Claim

ZEROS = {"base-128": 0.857, "large-128": 0.864, "c2048": 0.886}
SIZES = {"base-128": (14.9e9, 1.27e9, 17.06), "large-128": (52.7e9, 3.96e9, 18.34), "c2048": (3142e9, 158.6e9, 20.07)}
"""Bytes in 16 bits, compressed bytes, and compression of the experts."""
WORDS, LONGEST, SAMPLE = 2**16, 28, 200_000


def entropy_bits(zeros: float) -> float:
    """Of one ternary weight."""
    rest = (1 - zeros) / 2
    return -zeros * log2(zeros) - 2 * rest * log2(rest)


@cache
def weights_per_word(zeros: float) -> float:
    """Mean weights that a word of 16 bits stands for: made-up weights, each time the longest word that fits."""
    rest = (1 - zeros) / 2
    chances = {"0": zeros, "+": rest, "-": rest}
    waiting = [(-p, symbol) for symbol, p in chances.items()]
    heapq.heapify(waiting)
    words: set[str] = set()
    while len(words) < WORDS:
        p, word = heapq.heappop(waiting)
        words.add(word)
        if len(word) < LONGEST:
            for symbol, q in chances.items():
                heapq.heappush(waiting, (p * q, word + symbol))
    weights = "".join(np.random.default_rng(0).choice(list(chances), SAMPLE, p=list(chances.values())))
    at = used = 0
    while at < SAMPLE - LONGEST:
        length = LONGEST
        while weights[at : at + length] not in words:
            length -= 1
        at += length
        used += 1
    return at / used


def claims() -> list[Claim]:
    """Compression, sizes, where they fit."""
    found = [Claim("entropy bound, c2048", "section 4", 25.4, 16 / entropy_bits(ZEROS["c2048"]), "ratio", 0.02)]
    for model, zeros in ZEROS.items():
        whole, small, ratio = SIZES[model]
        ours = weights_per_word(zeros)
        # what is not experts stays: whole = experts + rest, small = experts / ratio + rest
        rest = (small - whole / ratio) / (1 - 1 / ratio)
        found += [
            Claim(f"compression of experts, {model}", "table 5", ratio, ours, "ratio", 0.1),
            Claim(f"compressed, {model}", "table 5", small, (whole - rest) / ours + rest, "bytes", 0.1),
        ]
    size = SIZES["c2048"][0] / weights_per_word(ZEROS["c2048"])
    bits = 16 / weights_per_word(ZEROS["c2048"])
    return [
        *found,
        Claim("bits for each parameter, c2048", "abstract", 0.807, bits, "", 0.1),
        Claim("c2048 over the memory of 4 x 48 GB", "section 5", "< 1", size / (4 * 48 * 2**30), "ratio"),
        Claim("c2048 over the memory of 8 x 24 GB", "section 5", "< 1", size / (8 * 24 * 2**30), "ratio"),
    ]
