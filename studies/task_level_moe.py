"""Task-level MoE (arXiv 2110.03742): a route for each task, so that a small network can be cut out and served.

Question: how much faster is decoding when no token is sent anywhere, and is communication all that is saved?

Setting: Transformer-Base (6 + 6 layers of width 512) with 32 experts in every second layer, top-2, decoded at its peak
rate on 32 TPU v3 cores, where arithmetic sets the time. The share of the step that is communication is the paper's.
The vocabulary is what gives the paper's 142 million parameters without experts. And the packaged trace (top-8 of 64),
a request being a task.

Lever: top-2 by token, or a fixed set by task of the size of the dense network's.

Expected before the first run: communication alone, 26.9 % of the step, gives 1.37 and not 1.87. The second expert that
a token computes adds FLOP, which does not fill the gap either; experts padded to twice the even load might.

Cannot speak about: the capacity of the paper's experts, which is not at hand; quality, which is why tasks are trained
for. A request of the packaged trace is not a task, its router was not trained to keep one together, so that its set
keeps only part of what tokens would choose.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from moesim.files.scenarios import load_trace
from moesim.mixers import Attention
from moesim.model import Dense, Experts, Layer, ModelSpec
from moesim.routing.load import expert_load_LE
from moesim.routing.scores import with_scores
from moesim.routing.variants import Routed, softmax, task_level, top_k
from moesim.study import Claim

COMMUNICATION = 0.269
"""Share of a step of token-level decoding, as published."""
VOCABULARY = 64_000
"""With an input table on each side and a head; gives 142 million parameters."""


def transformer(num_experts: int) -> ModelSpec:
    """Transformer-Base, with experts in every second layer if there is more than one."""
    mixer, dense = Attention(8, 8, 64), Dense(2048, gated=False)
    routed = Experts((2048,) * num_experts, 2, gated=False) if num_experts > 1 else dense
    encoder = [Layer(mixer, routed if i % 2 else dense) for i in range(6)]
    decoder = [Layer(mixer, routed if i % 2 else dense, cross=mixer) for i in range(6)]
    return ModelSpec("transformer-base", 512, VOCABULARY, (*encoder, *decoder), extra_params=VOCABULARY * 512)


def decoder_flops(rows_per_token: float) -> float:
    """A token's FLOP in the decoder with as many rows at the experts of three layers.

    Keys and values of the encoder are at hand, so that attention over its output has two products only.
    """
    attention, cross, dense = 4 * 512**2, 2 * 512**2, 2 * 512 * 2048
    return 2.0 * (6 * (attention + cross) + 3 * dense + 3 * rows_per_token * dense + 512 * VOCABULARY)


def speedup(rows_per_token: float) -> float:
    """Task-level over token-level decoding where FLOP set the time of all that is not communication."""
    return decoder_flops(rows_per_token) / decoder_flops(1.0) / (1 - COMMUNICATION)


@cache
def scores_TLE() -> NDArray[np.float16]:
    """Of the packaged trace; those of experts that a token did not choose are drawn by popularity."""
    trace = load_trace("olmoe-shape-16x64")
    scored = with_scores(trace, expert_load_LE(trace), np.random.default_rng(0)).scores_TLE
    assert scored is not None
    return scored


def by_request(layer: int) -> tuple[Routed, Routed]:
    """The packaged trace's choices in a layer: token by token, and with a set for each request."""
    probability_TE = softmax(scores_TLE()[:, layer])
    return top_k(probability_TE, 8), task_level(probability_TE, load_trace("olmoe-shape-16x64").request_T, 8)


def distinct_per_request(routed: Routed) -> float:
    """Experts that a request's tokens use in one layer, mean over requests."""
    request_T = load_trace("olmoe-shape-16x64").request_T
    first = np.flatnonzero(np.diff(request_T, prepend=-1))
    return float(np.logical_or.reduceat(routed.chosen_TE, first, axis=0).sum(axis=1).mean())


def claims() -> list[Claim]:
    """Parameters, speed, and what a request's set keeps on real routing."""
    dense, sparse = transformer(1).num_params, transformer(32).num_params
    layers = [by_request(layer) for layer in (0, 5, 10, 15)]
    kept = np.mean([(task.chosen_TE & token.chosen_TE).sum() / token.chosen_TE.sum() for token, task in layers])
    used = np.mean([distinct_per_request(token) / distinct_per_request(task) for token, task in layers])
    return [
        Claim("parameters of the dense model", "models", 142e6, dense, "", 0.01, fitted=f"{VOCABULARY} words"),
        Claim("parameters with 32 experts", "models", 533e6, sparse, "", 0.01),
        Claim("parameters of the sub-network of a task: times fewer", "models", 3.75, sparse / dense, "ratio", 0.01),
        Claim("task-level over token-level, communication alone", "peak tokens/s", 1.87, speedup(1.0), "ratio",
              0.1, because="a token also computes two experts where the dense network has one, and both are padded"),
        Claim("task-level over token-level, and two experts of a token", "peak tokens/s", 1.87, speedup(2.0),
              "ratio", 0.1, because="experts take as many rows as their capacity, not as tokens choose"),
        Claim("task-level over token-level, if experts are padded to twice the even load", "peak tokens/s", 1.87,
              speedup(4.0), "ratio", 0.1),
        Claim("200 languages, 128 experts, 13B: task-level over token-level", "multilingual", 2.6, None, "ratio", 0.1,
              because="its sizes and its share of communication are not at hand"),
        Claim("packaged trace: experts of a request's tokens over those of its set", "not in the paper", None,
              float(used), "ratio", because="the paper's routes are trained"),
        Claim("packaged trace: tokens' choices that lie in their request's set", "not in the paper", None, float(kept),
              "fraction", because="the paper's routes are trained"),
    ]  # fmt: skip
