"""What routing variants do to one MoE layer: load, messages and time on real routing, beside plain top-8.

Question: which rules that change how many experts a token has also change what a machine has to do?

Setting: the packaged trace (top-8 of 64; mean of 16 layers) on two nodes of `hgx-h100` (`2 x hgx-h100`, 16 GPUs) with
the sizes of OLMoE-1B-7B: 64 tokens of decoding, where weights are read, and 2048 of prefill. First choices and their
weights are real; other scores are drawn by popularity (`with_scores`). Free experts get the scores of true ones at
other tokens.

Lever: the rule: 16 free experts beside the 64 (MoE++ arXiv 2410.07348, AdaMoE arXiv 2406.13233), top-p and one
threshold at the mean of 8 experts (Dynamic MoE arXiv 2403.07652, ReMoE arXiv 2412.14711), experts that choose (arXiv
2202.09368), light ones skipped (arXiv 2402.14800), widths 9 to 23 (HMoE arXiv 2408.10681), four sub-tokens (MH-MoE
arXiv 2404.15045).

Expected before the first run: free experts take a fifth of messages and FLOP in prefill, and less than that of the time
of decoding, which goes with the distinct experts. At an equal mean, rules with a varying number of experts cost about
what top-8 costs. Sub-tokens move the same bytes.

Cannot speak about: quality, routers trained for these rules, and kernels for experts of several widths, which are taken
to reach what others do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from moesim.costs.moe_layer import LayerEffects, layer_effects
from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.scenarios import load_trace
from moesim.model import Experts
from moesim.routing.capacity import expert_choice
from moesim.routing.load import expert_load_LE
from moesim.routing.scores import with_scores
from moesim.routing.variants import (
    Routed,
    arithmetic_widths,
    multi_head,
    relu_gate,
    skip_light,
    softmax,
    top_k,
    top_p,
)
from moesim.study import Claim, bisected

Floats = NDArray[np.float64]
GPUS, K, FREE, HEADS = 16, 8, 16, 4
MODEL = load_model("olmoe-1b-7b")
PLAIN = MODEL.experts


@cache
def scores(phase: str) -> Floats:
    """[L, T, E] of the first token that each request decodes, or of the first 2048 tokens of prompts."""
    trace = load_trace("olmoe-shape-16x64")
    if phase == "decode":
        is_first_T = trace.is_decode_T & ~np.r_[False, trace.is_decode_T[:-1]]
        rows = np.flatnonzero(is_first_T)
    else:
        rows = np.flatnonzero(~trace.is_decode_T)[:2048]
    scored = with_scores(
        trace.take(rows), expert_load_LE(trace).astype(np.float64), np.random.default_rng(0)
    ).scores_TLE
    assert scored is not None
    return np.asarray(scored.swapaxes(0, 1), np.float64)


def with_free(scores_TE: Floats) -> Routed:
    """Top-8 of the true experts and `FREE` free ones."""
    rng = np.random.default_rng(0)
    free_TE = scores_TE[rng.permutation(len(scores_TE))][:, rng.permutation(scores_TE.shape[1])[:FREE]]
    return top_k(np.concatenate([scores_TE, free_TE], axis=1), K, num_free=FREE)


def at_mean(rule: Callable[[float], Routed], low: float, high: float) -> Routed:
    """The rule at the parameter that gives a mean of `K` experts, by bisection."""
    return rule(bisected(lambda x: rule(x).mean_experts < K, low, high, 20)[1])


def top_p_at_mean(scores_TE: Floats) -> Routed:
    """Top-p at the p that gives `K` experts in the mean."""
    probability_TE = softmax(scores_TE)
    return at_mean(lambda p: top_p(probability_TE, p), 1e-3, 1.0)


def skipped(scores_TE: Floats) -> Routed:
    """Top-8 without experts below nine tenths of the best one's weight."""
    return skip_light(top_k(scores_TE, K), softmax(scores_TE), 0.9)


RULES: dict[str, Callable[[Floats], Routed]] = {
    "top-8": lambda scores_TE: top_k(scores_TE, K),
    "free experts": with_free,
    "top-p": top_p_at_mean,
    "one threshold": lambda scores_TE: relu_gate(softmax(scores_TE), K),
    "expert choice": lambda scores_TE: expert_choice(scores_TE, K * len(scores_TE) // scores_TE.shape[1]),
    "light skipped": skipped,
}


@cache
def routed(rule: str, phase: str) -> tuple[Routed, ...]:
    """Of each layer."""
    return tuple(RULES[rule](scores_TE) for scores_TE in scores(phase))


@cache
def effects(rule: str, phase: str, ffn: Experts = PLAIN) -> tuple[LayerEffects, ...]:
    """Of each layer."""
    cluster = load_cluster("2 x hgx-h100")
    return tuple(layer_effects(r, ffn, MODEL.hidden_size, cluster, GPUS) for r in routed(rule, phase))


def mean_experts(rule: str) -> float:
    """Experts per token in prefill, mean over layers."""
    return float(np.mean([r.mean_experts for r in routed(rule, "prefill")]))


def mean(rule: str, phase: str, of: str, ffn: Experts = PLAIN) -> float:
    """One of the effects, mean over layers."""
    return float(np.mean([getattr(e, of) for e in effects(rule, phase, ffn)]))


def ratio(rule: str, phase: str, of: str, ffn: Experts = PLAIN) -> float:
    """Over that of top-8."""
    return mean(rule, phase, of, ffn) / mean("top-8", phase, of)


def free_claims() -> list[Claim]:
    """Free experts."""
    left = ratio("free experts", "prefill", "flops")
    return [
        Claim("free experts, prefill: FLOP left", "MoE++: N_F / (N_F + N_Z)", 64 / 80, left, "ratio", 0.05),
        Claim("free experts, prefill: messages left", "free ones are on every GPU", "< 1",
              ratio("free experts", "prefill", "rank_messages"), "ratio"),
        Claim("free experts, prefill: time of the layer left", "expert forward time", "< 1",
              ratio("free experts", "prefill", "seconds"), "ratio"),
        Claim("free experts, decoding: time of the layer left", "not in the paper", None,
              ratio("free experts", "decode", "seconds"), "ratio", because="a prediction: decoding reads "
              f"{ratio('free experts', 'decode', 'distinct_experts'):.0%} of the experts that top-8 reads"),
    ]  # fmt: skip


def equal_mean_claims() -> list[Claim]:
    """Rules at the same mean number of experts."""
    found = []
    for rule in ("top-p", "one threshold", "expert choice", "light skipped"):
        busy, plain = (mean(name, "prefill", "rank_imbalance") for name in (rule, "top-8"))
        said = f"{mean_experts(rule):.2f} experts per token, busiest GPU {busy:.2f} of the mean (top-8 {plain:.2f}), "
        said += f"messages {ratio(rule, 'prefill', 'rank_messages'):.2f}; in decoding "
        said += f"{ratio(rule, 'decode', 'seconds'):.2f}, experts read {ratio(rule, 'decode', 'distinct_experts'):.2f}"
        found.append(
            Claim(f"{rule}: time of a layer in prefill over top-8", "not in the paper", None,
                  ratio(rule, "prefill", "seconds"), "ratio", because=said)
        )  # fmt: skip
    return found


def width_claims() -> list[Claim]:
    """Eight widths from 9 to 23, again and again, of the same sum as eight times 16."""
    unit = PLAIN.expert_widths[0] // 16
    widths = tuple(unit * width for width in arithmetic_widths(9, 23, 8)) * (PLAIN.num_experts // 8)
    varied = replace(PLAIN, expert_widths=widths)
    return [
        Claim("widths 9 to 23: time of a layer in prefill", "not in the paper", None,
              ratio("top-8", "prefill", "seconds", varied), "ratio", because="a prediction: the slowest GPU decides"),
    ]  # fmt: skip


def head_claims() -> list[Claim]:
    """Sub-tokens of a quarter of the width, with random scores: a trace of tokens has none of them."""
    rng, cluster = np.random.default_rng(0), load_cluster("2 x hgx-h100")
    whole = layer_effects(top_k(rng.normal(size=(2048, 64)), K), PLAIN, MODEL.hidden_size, cluster, GPUS)
    pieces = multi_head(rng.normal(size=(2048, HEADS, 64)), K)
    cut = layer_effects(pieces, PLAIN, MODEL.hidden_size // HEADS, cluster, GPUS)
    return [
        Claim("four sub-tokens: bytes between GPUs", "method", 1.0,
              cut.rank_messages / HEADS / whole.rank_messages, "ratio", 0.02),
        Claim("four sub-tokens: time of the experts", "not in the paper", None, cut.experts_s / whole.experts_s,
              "ratio", because="a prediction, without what a shorter product loses"),
    ]  # fmt: skip


def claims() -> list[Claim]:
    """Free experts, equal means, widths, sub-tokens."""
    return [*free_claims(), *equal_mean_claims(), *width_claims(), *head_claims()]
