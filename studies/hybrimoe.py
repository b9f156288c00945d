"""HybriMoE (arXiv 2504.05897): GPU, CPU and link played ahead, prefetch by impact, cache by score.

Question: what do the three parts bring over computing all misses on the CPU, and does a cache by router scores hit
more than LRU?

Setting: Qwen2-57B-A14B in 4 bits, a quarter of the experts on an RTX A6000, ten cores of a Xeon Gold 5220R. Its
platform has PCIe 3.0, three quarters of which is 12 GB/s; the CPU takes 0.9 ms for an expert and 0.1 ms more for each
token, as the order of the paper's figure 3 has it; a CPU that is cold takes 0.3 ms longer, which is assumed. What
remains of a layer (framework, attention) is the constant that gives the published time between tokens of
kTransformers. Routing: the packaged trace of a small trained model of Qwen2's routing shape (64 experts, top-8), its
16 layers for 28; guesses are those of its routers, one layer ahead. Hit ratios of DeepSeek-V2-Lite: 800 tokens of a
public capture of it (ESFT, intents), where that lies beside the project. The length of the ablation's prompts is not
at hand: 256 tokens.

Lever: executor, prefetcher, cache, each alone and together, over kTransformers.

Expected before the first run: decoding gains of each part within a fifth, the schedule bringing most. Prefill only
roughly: its length is not known. The cache by scores gains less here than published, since the traces hold the scores
of the chosen experts only, and it lives from those that were nearly chosen.

Slow: ten seconds of replays.

Cannot speak about: the bars of figures 7 and 8, which have no printed values; Mixtral's routing, of which no trace is
public.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from moesim.files.scenarios import load_trace
from moesim.offload.replay import PolicySet, Replayed, UnitTimes, replay
from moesim.policies.cache import LFU, LRU, MRS, Popular
from moesim.policies.executor import HybriMoE, KTransformers, OnDemand
from moesim.policies.predictor import NextLayerGate, NoPredictor
from moesim.policies.prefetch import Impact, NoPrefetch
from moesim.routing.trace import RoutingTrace
from moesim.study import ABSENT, ESFT, Claim, public_trace

LAYERS, SHARE = 28, 0.25
EXPERT_BYTES = 3 * 3584 * 2560 * (0.5 + 2 / 128)
TIMES = UnitTimes(
    EXPERT_BYTES, 12e9, gpu_expert_s=EXPERT_BYTES / (0.86 * 768e9) + 6e-6, cpu_expert_s=0.9e-3, cpu_token_s=0.1e-3,
    cold_s=0.3e-3, host_bytes_per_s=0.7 * 128e9,
)  # fmt: skip
DECODE = {"kTransformers": 0.21, "schedule": 0.14, "prefetch": 0.18, "cache": 0.15, "all": 0.11}
"""Seconds between tokens."""
PREFILL = {"kTransformers": 1.47, "schedule": 1.17, "prefetch": 1.39, "all": 1.13}
PROMPT_TOKENS, ANSWERS = 256, 64
TRACE = "olmoe-shape-16x64"


def policies(part: str, is_prefill: bool) -> PolicySet:
    """Of kTransformers with that part of HybriMoE's; in prefill, kTransformers copies what is missing."""
    whole = part == "all"
    executor = HybriMoE() if whole or part == "schedule" else OnDemand() if is_prefill else KTransformers()
    if part == "prefetch" or whole:
        return PolicySet(MRS() if whole else LFU(), NextLayerGate(), Impact(), executor)
    if part == "kTransformers":
        return PolicySet(Popular(), NoPredictor(), NoPrefetch(), executor)
    return PolicySet(MRS() if part == "cache" else LFU(), NoPredictor(), NoPrefetch(), executor)


@cache
def decoded(part: str, layer_s: float) -> Replayed:
    """Answers of a few requests, one token a step."""
    trace = load_trace(TRACE)
    answers = np.flatnonzero(trace.is_decode_T)
    rows = [np.array([t]) for t in answers[: 2 * ANSWERS]]
    slots = int(SHARE * 64) * trace.num_layers
    return replay(
        trace, rows, TIMES, slots, policies(part, False), layer_s=layer_s, history=answers[2 * ANSWERS :], keep=2
    )


def tbt_s(part: str, layer_s: float) -> float:
    """Seconds between tokens, all layers of the model."""
    return float(decoded(part, layer_s).seconds_S[20:].mean()) * LAYERS / load_trace(TRACE).num_layers


@cache
def fitted_layer_s() -> float:
    """What gives kTransformers' time between tokens; all else is a sum that does not depend on it."""
    return (DECODE["kTransformers"] - tbt_s("kTransformers", 0.0)) / LAYERS


@cache
def ttft_s(part: str) -> float:
    """Of prompts of `PROMPT_TOKENS` that are computed at once."""
    trace = load_trace(TRACE)
    prompts = np.flatnonzero(~trace.is_decode_T)
    rows = [prompts[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(4)]
    found = replay(
        trace, rows, TIMES, int(SHARE * 64) * trace.num_layers, policies(part, True), layer_s=fitted_layer_s(),
        is_prefill_S=[True] * len(rows), history=np.flatnonzero(trace.is_decode_T),
    )  # fmt: skip
    return float(found.seconds_S[1:].mean()) * LAYERS / trace.num_layers


def hit_rate(trace: RoutingTrace, policy: object, share: float) -> float:
    """Of single tokens in a row."""
    answers = np.flatnonzero(trace.is_decode_T) if trace.is_decode_T.any() else np.arange(trace.num_tokens)
    rows = [np.array([t]) for t in answers[:400]]
    slots = round(share * trace.num_experts) * trace.num_layers
    return replay(trace, rows, UnitTimes(1.0, 1.0), slots, PolicySet(policy)).uses.hit_rate


def claims() -> list[Claim]:
    """Decoding, prefill, hits."""
    layer_s = fitted_layer_s()
    where = "table III, Qwen2, 25 % on the GPU"
    unfed = "kTransformers copies nothing while it decodes, so that a cache has nothing to choose from; what feeds the "
    unfed += "cache of this row is not at hand"
    small = "the packaged trace is of a small model, trained for minutes, whose next token shares fewer experts"
    found = []
    for part, paper in DECODE.items():
        is_base = part == "kTransformers"
        found.append(
            Claim(f"decode, {part}", where, paper, tbt_s(part, layer_s), "s", 0.2,
                  fitted=f"{1e3 * layer_s:.2f} ms a layer besides its experts" if is_base else "",
                  because=unfed if part == "cache" else "")
        )  # fmt: skip
    found += [Claim(f"prefill, {part}", where, paper, ttft_s(part), "s", 0.2) for part, paper in PREFILL.items()]
    trace = public_trace(ESFT[0])
    absent = "" if trace else ABSENT
    for name, policy, paper in (("LRU", LRU(), 0.477), ("MRS", MRS(), 0.527)):
        ours = hit_rate(trace, policy, SHARE) if trace else None
        found.append(
            Claim(f"hits of {name}, DeepSeek-V2-Lite, 25 %", "figure 9", paper, ours, "fraction", 0.05 / paper,
                  because=absent)
        )  # fmt: skip
    packaged = load_trace(TRACE)
    found += [
        Claim(f"hits of {name}, Qwen2, 25 %", "figure 9", paper, hit_rate(packaged, policy, SHARE), "fraction",
              0.05 / paper, because=small)
        for name, policy, paper in (("LRU", LRU(), 0.45), ("MRS", MRS(), 0.528))
    ]  # fmt: skip
    return found
