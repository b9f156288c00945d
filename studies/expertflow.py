"""ExpertFlow (arXiv 2410.17954): a predictor of the whole path, a cache that follows it, and tokens regrouped by route.

Question: how much oftener is an expert on the GPU when all layers are known in 9 of 10 cases before the first, how
much faster is that than copying whole layers, and what does it bring to put tokens together that use the same
experts?

Setting: Switch-32 and Switch-128 in 16 bits (12 MoE layers) on an A40, 24 GB/s to its host, 16 experts of each layer
in its memory; batches of single tokens. Their routing is not public: it is made up, every request of a batch with
preferences of its own among the experts of a layer, drawn from a Dirichlet distribution whose concentration is fitted
to what LRU hits at batch 4. The predictor is right with probability 0.92, as the paper says of its own domain. A
layer computes for 2 ms, which is assumed: experts are little beside the framework. Memory: everything but the routed
experts, and 4 slots in each layer, from the packaged models; DeepSeek-MoE from its makers' sizes. Regrouping: tokens
drawn at random from DeepSeek-V2-Lite's capture (ESFT), where it lies beside the project, and from the packaged trace.

Lever: batch; cache, predictor and prefetch; order of tokens.

Expected before the first run: hits of the prediction and a few points more, since a wrong guess may be in the cache
anyway. (Of a Zipf distribution for all requests, which came first, LRU hit 69 % at batch 16.) Whole layers cost about
as much more as they have experts that nobody uses.

Cannot speak about: gains on Mixtral, Qwen1.5 and DeepSeek, for want of their rates; accuracy of the predictor.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from moesim.files.models import load_model
from moesim.files.scenarios import load_trace
from moesim.offload.hits import hit_rates_C
from moesim.offload.replay import PolicySet, Replayed, UnitTimes, replay
from moesim.policies.cache import LRU
from moesim.policies.grouping import Regrouped
from moesim.routing.synthetic import sticky_trace
from moesim.routing.trace import RoutingTrace
from moesim.study import ABSENT, ESFT, Claim, public_trace

LAYERS, SLOTS, STEPS = 12, 16, 60
HITS = {"LRU": {4: 0.7661, 16: 0.5837}, "PLEC": {4: 0.9190, 16: 0.8591}}
"""Switch-32, 16 slots: by batch."""
EXPERT_BYTES = 2 * 2 * 768 * 3072
TIMES = UnitTimes(EXPERT_BYTES, 0.75 * 32e9, EXPERT_BYTES / (0.7 * 696e9) + 6e-6)
LAYER_S = 2e-3
MEMORY = {"Switch-128": 1.03e9, "DeepSeek-MoE": 6.38e9, "Qwen1.5-MoE": 6.52e9}
"""Bytes with ExpertFlow."""
DEEPSEEK_MOE = (16.38e9, 27 * 64, 3 * 2048 * 1408)
"""Parameters, routed experts, parameters of one."""


@cache
def routing(experts: int, concentration: float, batch: int) -> RoutingTrace:
    """Single choices of requests that decode together, each with preferences of its own; token by token."""
    rng = np.random.default_rng(0)
    trace = sticky_trace(LAYERS, experts, 1, stickiness=0.0, num_tokens=STEPS * batch)
    upto_QLE = rng.dirichlet(np.full(experts, concentration), (batch, LAYERS)).cumsum(axis=2)
    drawn_SQL = rng.random((STEPS, batch, LAYERS))
    ids_SQL = np.minimum((drawn_SQL[..., None] > upto_QLE).sum(axis=3), experts - 1)
    trace.expert_ids_TLK[:] = ids_SQL.reshape(-1, LAYERS, 1)
    return trace


def rows(batch: int) -> list[np.ndarray]:
    """Tokens of each step."""
    return [np.arange(s * batch, (s + 1) * batch) for s in range(STEPS)]


@cache
def lru_hits(concentration: float, batch: int) -> float:
    """Of each layer's own slots."""
    return float(hit_rates_C(routing(32, concentration, batch), rows(batch), LRU(), [SLOTS * LAYERS])[0])


@cache
def fitted_concentration() -> float:
    """Whose hits of LRU come nearest to the published ones at batch 4."""
    return min((a / 100 for a in range(10, 31)), key=lambda a: abs(lru_hits(a, 4) - HITS["LRU"][4]))


@cache
def replayed(system: str, experts: int, batch: int) -> Replayed:
    """So many steps; SE-MoE has two layers on the GPU."""
    slots = 2 * experts if system == "se_moe" else SLOTS * LAYERS
    trace = routing(experts, fitted_concentration(), batch)
    return replay(trace, rows(batch), TIMES, slots, PolicySet.of(system), layer_s=LAYER_S)


def small_bytes(name: str) -> float:
    """All but the routed experts, and four of those in each layer, 16 bits."""
    if name == "DeepSeek-MoE":
        params, num_experts, one = DEEPSEEK_MOE
        num_layers = num_experts / 64
    else:
        model = load_model({"Switch-128": "switch-base-128", "Qwen1.5-MoE": "qwen1.5-moe-a2.7b"}[name])
        params, num_layers = model.num_params, len(model.moe_layers)
        one = model.experts.expert_params(model.hidden_size, model.experts.expert_widths[0])
        num_experts = num_layers * model.experts.num_experts
    return 2.0 * (params - (num_experts - 4 * num_layers) * one)


def regrouped(trace: RoutingTrace, size: int) -> float:
    """Experts of a layer for two batches, in any order over regrouped; mean of 40."""
    ids_TLK, rng = trace.expert_ids_TLK, np.random.default_rng(0)
    used = np.zeros(2)
    for _ in range(40):
        waiting = rng.choice(trace.num_tokens, 2 * size, replace=False)
        together = Regrouped().batch(ids_TLK[waiting], trace.num_experts, size)
        for n, taken in enumerate((np.arange(size), together)):
            for group in (taken, np.setdiff1d(np.arange(2 * size), taken)):
                used[n] += sum(len(np.unique(ids_TLK[waiting[group], layer])) for layer in range(trace.num_layers))
    return float(used[0] / used[1])


def claims() -> list[Claim]:
    """Hits, times, memory, regrouping."""
    chosen, where = fitted_concentration(), "hit rates, Switch-32, 16 slots"
    sure = "a wrong guess finds its expert in the cache all the same, which keeps what nobody needs room for"
    apart = "32 requests without common preferences use 30 experts of a layer: copies of 128 take four times as long"
    weights = "weights only: activations, caches and the framework's own memory are in the paper's figure"
    found = []
    for batch, paper in HITS["LRU"].items():
        found.append(
            Claim(f"hits of LRU, batch {batch}", where, paper, lru_hits(chosen, batch), "fraction", 0.05 / paper,
                  fitted=f"Dirichlet concentration {chosen:.2f}" if batch == 4 else "")
        )  # fmt: skip
    for batch, paper in HITS["PLEC"].items():
        found.append(
            Claim(f"hits of ExpertFlow, batch {batch}", where, paper, replayed("expertflow", 32, batch).uses.hit_rate,
                  "fraction", 0.05 / paper, because=sure)
        )  # fmt: skip
    rate = {name: 1 / replayed(name, 128, 32).seconds_S[5:].mean() for name in ("expertflow", "se_moe", "on_demand")}
    found += [
        Claim("ExpertFlow over SE-MoE, Switch-128, batch 32", "speed-ups, WMT16, 16 slots", 5.86,
              float(rate["expertflow"] / rate["se_moe"]), "ratio", 0.2, because=apart),
        Claim("ExpertFlow over LRU on demand, Switch-128, batch 32", "not at hand", None,
              float(rate["expertflow"] / rate["on_demand"]), "ratio"),
    ]  # fmt: skip
    found += [
        Claim(f"memory, {name}", "memory", paper, small_bytes(name), "bytes", 0.2,
              because="" if name == "Qwen1.5-MoE" else weights)
        for name, paper in MEMORY.items()
    ]  # fmt: skip
    captured = public_trace(*ESFT)
    other = "on tokens of other models: fewer experts to copy, where the paper has time"
    return [
        *found,
        Claim("experts of a batch of 16, as they come over regrouped, packaged trace", "token scheduler alone",
              "1.03 to 1.17", regrouped(load_trace("olmoe-shape-16x64"), 16), "ratio"),
        Claim("the same, DeepSeek-V2-Lite", "not at hand", None, regrouped(captured, 16) if captured else None, "ratio",
              because=other if captured else ABSENT),
    ]  # fmt: skip
