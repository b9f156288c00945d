"""Faster MoE inference (arXiv 2505.03531): skipping experts, by regime of load.

Question: what does it bring to let a token choose 2 experts instead of 6, at few requests, at many, and where
arithmetic bounds the step?

Setting: DeepSeek-V2-Lite (64 routed experts, top-6, 2 shared) on one `h100-x1` with rooflines, contexts of 128 tokens,
even routing; and the packaged trace's real routing (64 experts, top-8) at OLMoE's sizes. The paper ran SGLang; on
which GPU and at which loads is not at hand.

Lever: experts per token, by rank: the heaviest stay.

Expected before the first run: at few requests the time goes with the distinct experts that are read, so the gain is
near the paper's half; at some hundreds all experts are read with 2 as with 6, and it nearly vanishes; in prefill it is
the ratio of FLOP.

Cannot speak about: accuracy, and which experts a model can do without. The paper's charts are not at hand, only what
its text says of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from moesim.costs.moe_layer import rank_messages
from moesim.estimate import estimate
from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.scenarios import load_trace
from moesim.layout import Layout
from moesim.model import Experts, ModelSpec
from moesim.routing.synthetic import zipf_trace
from moesim.routing.trace import RoutingTrace
from moesim.routing.variants import top_k
from moesim.scenario import Scenario
from moesim.study import Claim
from moesim.workload import Workload

LOW, MID = (1, 4, 8, 16), 256
"""Requests at a time."""


def with_top_k(model: ModelSpec, k: int) -> ModelSpec:
    """The model with k routed experts for each token."""
    layers = [replace(x, ffn=replace(x.ffn, top_k=k)) if isinstance(x.ffn, Experts) else x for x in model.layers]
    return replace(model, layers=tuple(layers))


@cache
def even(num_layers: int, k: int) -> RoutingTrace:
    """Even, independent routing over 64 experts."""
    return zipf_trace(num_layers, 64, k, num_requests=256, prompt_tokens=32, output_tokens=2, exponent=0.0)


def metrics(name: str, k: int, requests: int, prompt_tokens: int = 128, real: bool = False) -> dict[str, float]:
    """Of decoding and prefill with k experts per token."""
    model = with_top_k(load_model(name), k)
    trace = load_trace("olmoe-shape-16x64") if real else even(len(model.moe_layers), k)
    if real:
        trace = replace(trace, expert_ids_TLK=trace.expert_ids_TLK[..., :k], weights_TLK=None, predicted_HTLW=())
    workload = Workload(requests, 2, prompt_tokens)
    return dict(estimate(Scenario("", model, load_cluster("h100-x1"), Layout(), workload, trace)).metrics)


@cache
def gain(requests: int, real: bool = False) -> float:
    """Decoding: how many times as fast with a third of the experts (a bit more than that of 8)."""
    name, ks = ("olmoe-1b-7b", (8, 3)) if real else ("deepseek-v2-lite", (6, 2))
    whole, skipped = (metrics(name, k, requests, real=real)["tpot_s"] for k in ks)
    return whole / skipped


def flops_per_token(model: ModelSpec) -> float:
    """Of its matrices, without head and embedding."""
    return 2 * (model.num_active_params - model.embedding_params)


def prefill_gain() -> float:
    """16 prompts of 1024 tokens."""
    whole, skipped = (metrics("deepseek-v2-lite", k, 16, 1024)["prefill_tokens_per_s"] for k in (6, 2))
    return skipped / whole


def exchanged_ratio(num_ranks: int = 8) -> float:
    """Bytes that top-2 moves between 8 ranks over those of tensor parallelism's all-reduces, on even routing."""
    T, scores_TE = 8000, np.random.default_rng(0).random((8000, 64))
    messages = rank_messages(top_k(scores_TE, 2).chosen_TE, num_ranks).sum()
    return float(2 * messages / (2 * (num_ranks - 1) * T))


def distinct(tokens: int) -> float:
    """Experts that as many tokens touch with top-6 of 64, mean over draws."""
    scores_NTE = np.random.default_rng(0).random((400, tokens, 64))
    return float(np.mean([np.count_nonzero(top_k(scores_TE, 6).load_E) for scores_TE in scores_NTE]))


def claims() -> list[Claim]:
    """Regimes, then counts."""
    model = load_model("deepseek-v2-lite")
    whole, skipped = (flops_per_token(with_top_k(model, k)) for k in (6, 2))
    low, real_low = (max(gain(requests, real) for requests in LOW) for real in (False, True))
    alone = "with 8 requests; 1.35 with one. A roofline reads every touched expert at full speed and knows no host "
    alone += "time; what skipping does not shorten weighs more in a real engine"
    parts = "50 % of the experts' FLOP, shared ones included, 40 % with attention and the dense layer: "
    parts += "which of them the paper counts is not at hand"
    return [
        Claim("distinct experts of 16 tokens: n (1 - (1 - k / n)^16)", "formula", 64 * (1 - (1 - 6 / 64) ** 16),
              distinct(16), "", 0.01),
        Claim("6 to 2 experts, few requests: throughput, up to", "throughput by load", 1.5, low, "ratio", 0.1,
              because=alone),
        Claim("6 to 2 experts, 256 requests over few: share of the gain that is left", "throughput by load", "< 0.5",
              (gain(MID) - 1) / (low - 1), "fraction"),
        Claim("the same on real routing, 8 to 3 of the packaged trace", "throughput by load", "< 0.5",
              (gain(MID, True) - 1) / (real_low - 1), "fraction"),
        Claim("share of the layers' FLOP that 6 to 2 saves", "compute share", 0.45, 1 - skipped / whole, "fraction",
              0.1, because=parts),
        Claim("6 to 2 experts, prefill: throughput over the ratio of FLOP", "throughput by load", 1.0,
              prefill_gain() / (whole / skipped), "ratio", 0.15),
        Claim("bytes of expert over tensor parallelism, 2 of 64 experts on 8 GPUs", "formula", "<= 0.2858",
              exchanged_ratio(), "ratio"),
        Claim("pruning experts, low load: throughput, up to", "pruning", 2.3, None, "ratio", 0.1,
              because="how many experts were pruned is not at hand"),
        Claim("V2-Lite with 3.3 experts in the mean: accuracy lost", "abstract", "< 0.01", None, "fraction",
              because="no model is run"),
    ]  # fmt: skip
