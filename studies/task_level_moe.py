"""Task-level MoE (arXiv 2110.03742): a route for each task, so that a small network can be cut out and served.

Question: how much faster is decoding when no token is sent anywhere, and is communication all that is saved?

Setting: Transformer-Base (6 + 6 layers of width 512) with 32 experts in every second layer, top-2, decoded at its peak
rate on 32 TPU v3 cores, where arithmetic sets the time. The share of the step that is communication is the paper's.
The vocabulary is what gives the paper's 142 million parameters without experts. One MoE layer on `hgx-h100`:
OLMoE-1B-7B's under the packaged trace (top-8 of 64), where eight requests of the same GPU are a task; and one of
Transformer-Base's size with an expert on each of 32 and 128 H100.

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

from moesim.costs.moe_layer import layer_effects
from moesim.costs.operators import Operators
from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.scenarios import load_trace
from moesim.hardware import Cluster
from moesim.mixers import Attention
from moesim.model import Dense, Experts, Layer, ModelSpec
from moesim.routing.scores import gate_weights_TE
from moesim.routing.variants import task_level, top_k
from moesim.study import Claim

Floats = NDArray[np.float64]
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


# One layer in seconds


def experts_s(load_RE: NDArray[np.int64], ffn: Experts, hidden_size: int, cluster: Cluster) -> float:
    """Seconds of the slowest GPU when each computes its own tokens with its tasks' experts, which it has itself."""
    load_LRS = load_RE[None].astype(np.int32)
    params_LRS = np.full(load_LRS.shape, float(ffn.expert_params(hidden_size, ffn.expert_widths[0])))
    return float(Operators(cluster.device).experts(load_LRS, params_LRS, ffn, hidden_size, "bf16").seconds.max())


@cache
def decoding() -> tuple[Floats, ...]:
    """Gate weights of each layer for the first token that each of 64 requests decodes, eight on a GPU."""
    trace = load_trace("olmoe-shape-16x64")
    first = trace.take(np.flatnonzero(trace.is_decode_T & ~np.r_[False, trace.is_decode_T[:-1]]))
    return tuple(gate_weights_TE(first, layer) for layer in range(first.num_layers))


def token_level() -> tuple[float, float]:
    """Seconds of a layer of OLMoE over eight GPUs, and the share of them that is communication; mean over layers."""
    model, cluster = load_model("olmoe-1b-7b"), load_cluster("hgx-h100")
    found = [layer_effects(top_k(w_TE, 8), model.experts, model.hidden_size, cluster, 8) for w_TE in decoding()]
    seconds, exchange_s = sum(e.seconds for e in found), sum(e.dispatch_s + e.combine_s for e in found)
    return seconds / len(found), exchange_s / seconds


def by_tasks(tasks_per_gpu: int) -> tuple[float, float]:
    """The same with a set of eight experts for each task, and the share of gate weight that is in the sets."""
    model, cluster = load_model("olmoe-1b-7b"), load_cluster("hgx-h100")
    seconds, kept = [], []
    for weight_TE in decoding():
        T, E = weight_TE.shape
        chosen_TE = task_level(weight_TE, np.arange(T) * 8 * tasks_per_gpu // T, 8).chosen_TE
        seconds.append(experts_s(chosen_TE.reshape(8, -1, E).sum(axis=1), model.experts, model.hidden_size, cluster))
        kept.append((weight_TE * chosen_TE).sum() / weight_TE.sum())
    return float(np.mean(seconds)), float(np.mean(kept))


def even_gain(num_experts: int, tokens_per_gpu: int = 64) -> float:
    """Token-level over task-level seconds of a layer of Transformer-Base's size, an expert on each GPU."""
    cluster, ffn = load_cluster(f"{num_experts // 8} x hgx-h100"), Experts((2048,) * num_experts, 2, gated=False)
    scores_TE = np.random.default_rng(0).normal(size=(tokens_per_gpu * num_experts, num_experts))
    token_s = layer_effects(top_k(scores_TE, 2), ffn, 512, cluster, num_experts).seconds
    return token_s / experts_s(np.full((1, 2), tokens_per_gpu), ffn, 512, cluster)


def claims() -> list[Claim]:
    """Parameters, speed, and what a request's set keeps on real routing."""
    dense, sparse = transformer(1).num_params, transformer(32).num_params
    token_s, share = token_level()
    (one_s, one_kept), (each_s, each_kept) = by_tasks(1), by_tasks(8)
    reads = "eight sets of experts are read on a GPU where token-level routing reads its eight experts"
    return [
        Claim("parameters of the dense model", "models", 142e6, dense, "", 0.01, fitted=f"{VOCABULARY} words"),
        Claim("parameters with 32 experts", "models", 533e6, sparse, "", 0.01),
        Claim("parameters with 32 experts over those of the dense model", "models, said of decoders", 3.75,
              sparse / dense, "ratio", 0.01),
        Claim("task-level over token-level, communication alone", "peak tokens/s", 1.87, speedup(1.0), "ratio",
              0.1, because="a token also computes two experts where the dense network has one, and both are padded"),
        Claim("task-level over token-level, and two experts of a token", "peak tokens/s", 1.87, speedup(2.0),
              "ratio", 0.1, because="experts take as many rows as their capacity, not as tokens choose"),
        Claim("task-level over token-level, if experts are padded to twice the even load", "peak tokens/s", 1.87,
              speedup(4.0), "ratio", 0.1),
        Claim("200 languages, 128 experts, 13B: task-level over token-level", "multilingual", 2.6, None, "ratio", 0.1,
              because="its sizes and its share of communication are not at hand"),
        Claim("the gain grows from 32 to 128 experts, a layer on H100", "1.87 to 2.6", "> 1",
              even_gain(128) / even_gain(32), "ratio"),
        Claim("one task on each GPU, real routing: a layer is faster", "peak tokens/s", "> 1",
              token_s / one_s, "ratio"),
        Claim("communication's share of that layer, by token", "share of the step", None, share, "fraction",
              because="the paper's is of a whole step on TPU v3"),
        Claim("a task for each request, real routing: a layer over token-level", "not in the paper", None,
              token_s / each_s, "ratio", because=reads),
        Claim("gate weight that a task's set keeps, eight requests a task", "not in the paper", None, one_kept,
              "fraction",
              because=f"of a router not trained for tasks; {each_kept:.0%} where a token is its own task"),
    ]  # fmt: skip
