"""Fate (arXiv 2502.12224): the next layer's gate fed early, more experts fetched than needed, shallow layers kept.

Question: how fast do two small MoE models decode and compute prompts on old PCs when nearly every expert was fetched
in time?

Setting: an RTX 3090 on PCIe 3.0 x16, and a GTX 1080 Ti on PCIe 1.0 x16; experts of DeepSeek-MoE 16B (26 layers of 64,
top-6) and Qwen1.5-MoE (24 of 60, top-4). Fate has them in 4 bits, the unpopular quarter of a prompt in 2; load on
demand and EAP in 16. Routing of DeepSeek-MoE is that of DeepSeek-V2-Lite, of the same shape and makers (ESFT, three
tasks), where it lies beside the project; that of Qwen1.5 is made up: a third of a token's experts are those of the
token before. Half of the experts fit in 4 bits, and as many bytes of those in 16. Fitted: the share of a link that is
reached, to load on demand's prompts; and for each PC the seconds of an expert in its framework, to Fate's decoding of
one model.

Lever: policies, PCs, models.

Expected before the first run: prompts within a fifth, since they are copies; decoding of the other model too, if an
expert costs the same in both. What EAP hits is less certain: its budget is not at hand.

Slow: ten seconds of replays.

Cannot speak about: budgets of 7 to 24 GB one by one; quality of 2-bit experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from moesim.offload.replay import PolicySet, Replayed, UnitTimes, replay
from moesim.policies.cache import ShallowFirst
from moesim.policies.predictor import OracleStated
from moesim.policies.prefetch import Widened
from moesim.routing.synthetic import sticky_trace
from moesim.routing.trace import RoutingTrace
from moesim.study import ABSENT, ESFT, Claim, bisected, public_trace

PARAMS = 3 * 2048 * 1408
"""Of an expert of either model."""
BITS = {"Fate": 4 + 16 / 64, "EAP": 16.0, "load on demand": 16.0}
PROMPT_BITS = 0.75 * BITS["Fate"] + 0.25 * (2 + 16 / 64)
"""Of Fate's prompts."""
PC_LINKS = {"3090": 16e9, "1080 Ti": 4e9}
"""Nominal bytes a second."""
PROMPT = 512
PREFILL = {"Fate, 3090": 804.0, "Fate, 1080 Ti": 182.0}
DECODE = {
    ("DeepSeek-MoE", "3090"): {"Fate": 8.9, "EAP": 4.1},
    ("DeepSeek-MoE", "1080 Ti"): {"Fate": 2.6, "EAP": 2.2},
    ("Qwen1.5-MoE", "3090"): {"Fate": 14.0, "load on demand": 3.7},
    ("Qwen1.5-MoE", "1080 Ti"): {"Fate": 3.7, "load on demand": 1.5},
}
"""Tokens a second, all of them."""
ON_DEMAND_PROMPT = 180.0
ACCURACY, WIDENED, HITS = 0.7879, 0.9715, 0.9908
STEPS = 150


@dataclass(frozen=True)
class PC:
    """link_bytes_per_s, as reached; expert_s: on the GPU, with the framework around it."""

    link_bytes_per_s: float
    expert_s: float


@cache
def routing(model: str) -> RoutingTrace | None:
    """A public capture, or made up."""
    if model == "DeepSeek-MoE":
        return public_trace(*ESFT)
    return sticky_trace(24, 60, 4, stickiness=1 / 3, num_tokens=STEPS)


@cache
def decoded(model: str, system: str, pc: PC) -> Replayed | None:
    """Single tokens."""
    trace = routing(model)
    if trace is None:
        return None
    policies = {
        "Fate": PolicySet(ShallowFirst(), OracleStated((WIDENED,)), Widened()),
        "EAP": PolicySet.of("moe_infinity"),
        "load on demand": PolicySet(),
    }[system]
    half = trace.num_layers * trace.num_experts / 2 * BITS["Fate"] / BITS[system]
    times = UnitTimes(PARAMS * BITS[system] / 8, pc.link_bytes_per_s, pc.expert_s)
    rows = [np.array([t]) for t in range(STEPS)]
    return replay(trace, rows, times, 0 if system == "load on demand" else int(half), policies)


def tokens_per_s(model: str, system: str, pc: PC) -> float | None:
    """After the first ones."""
    found = decoded(model, system, pc)
    return None if found is None else 1 / float(found.seconds_S[20:].mean())


@cache
def prompt_bytes(bits: float) -> float | None:
    """Of all experts that a prompt needs, each copied once."""
    trace = routing("DeepSeek-MoE")
    if trace is None:
        return None
    needed = sum(len(np.unique(trace.expert_ids_TLK[:PROMPT, layer])) for layer in range(trace.num_layers))
    return needed * PARAMS * bits / 8


def fitted_expert_s(name: str, link_bytes_per_s: float) -> float:
    """That gives Fate's decoding of DeepSeek-MoE; bisection, as time grows with it."""

    def is_fast(expert_s: float) -> bool:
        rate = tokens_per_s("DeepSeek-MoE", "Fate", PC(link_bytes_per_s, expert_s))
        return (rate or 0.0) > DECODE["DeepSeek-MoE", name]["Fate"]

    return sum(bisected(is_fast, 0.0, 20e-3, 12)) / 2


def claims() -> list[Claim]:
    """Prompts, decoding, hits."""
    whole = prompt_bytes(BITS["load on demand"])
    if whole is None:
        absent = ABSENT
        return [Claim("prompts and decoding", "evaluation", None, None, because=absent)]
    reached = whole * ON_DEMAND_PROMPT / PROMPT / PC_LINKS["3090"]
    pcs = {name: PC(reached * link, fitted_expert_s(name, reached * link)) for name, link in PC_LINKS.items()}
    found = [
        Claim("prompts on demand, DeepSeek-MoE, 3090", "prefill rates", ON_DEMAND_PROMPT, ON_DEMAND_PROMPT,
              "tokens_per_s", 0.2, fitted=f"{reached:.2f} of the link's nominal bytes a second"),
    ]  # fmt: skip
    for name, pc in pcs.items():
        rate = PROMPT / ((prompt_bytes(PROMPT_BITS) or 0.0) / pc.link_bytes_per_s)
        found.append(
            Claim(f"prompts with Fate, DeepSeek-MoE, {name}", "prefill rates", PREFILL[f"Fate, {name}"], rate,
                  "tokens_per_s", 0.2)
        )  # fmt: skip
    one = "8.3 GB/s in place of 10.1 would give it: for single tokens, copies wait for each other's launch"
    slow = "nothing says what EAP's framework takes for an expert of 16 bits on the old card; it has what Fate's takes"
    reasons = {("EAP", "1080 Ti"): slow, ("load on demand", "3090"): one}
    for (model, name), papers in DECODE.items():
        for system, paper in papers.items():
            is_fitted = (model, system) == ("DeepSeek-MoE", "Fate")
            found.append(
                Claim(f"decoding, {system}, {model}, {name}", "decode rates", paper,
                      tokens_per_s(model, system, pcs[name]), "tokens_per_s", 0.2,
                      fitted=f"{1e3 * pcs[name].expert_s:.2f} ms for each expert" if is_fitted else "",
                      because=reasons.get((system, name), ""))
            )  # fmt: skip
    fate = decoded("DeepSeek-MoE", "Fate", pcs["3090"])
    assert fate is not None
    return [
        *found,
        Claim("hits, Fate", "hit rate", HITS, fate.uses.hit_rate, "fraction", 0.05),
        Claim("accuracy of fetched experts", "prefetch accuracy", WIDENED, WIDENED, "fraction", 0.05,
              fitted=f"given: {ACCURACY} for as many as are needed, {WIDENED} when widened"),
    ]  # fmt: skip
