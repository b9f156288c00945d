"""MoE-Infinity (arXiv 2401.14361): prefetch and cache by the activations of past requests that look alike.

Question: how long does the GPU wait for experts when the whole request's activations say what comes next?

Setting: DeepSeek-V2-Lite in 16 bits on one A5000: 24 GB/s to the host, as the paper says, and 19.5 GB for experts (24
GB less weights of everything else, and 1.9 GB). What the GPU computes in a token is the published time less its idle
part, 104 ms; nothing is fitted. Routing: a public capture of the model (ESFT), where it lies beside the project;
without it the study has nothing to say. A request is 512 tokens of one of three tasks as its prompt and the next 32
as its answer, tasks in turn; the capture is of prompts, so answers are read from those too.

Lever: what is prefetched and kept (MoE-Infinity; all experts of the next layer as DeepSpeed; LRU on demand); the size
of the buffer, which long contexts leave.

Expected before the first run: the GPU waits for a few tens of milliseconds a token with MoE-Infinity, and for several
hundreds where whole layers are streamed; on demand with 1 GB for experts costs what nearly all experts of a token
take, 112 ms.

Slow: ten seconds of replays.

Cannot speak about: vLLM, Mixtral-Offloading, Ollama, whose times are those of their frameworks; Switch, NLLB, Arctic,
for want of their routing.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from moesim.offload.replay import PolicySet, Replayed, UnitTimes, replay
from moesim.policies.cache import ActivationAware, LRUDevice
from moesim.policies.predictor import EAMMatch
from moesim.policies.prefetch import ByActivity
from moesim.routing.trace import RoutingTrace
from moesim.study import ABSENT, ESFT, Claim, public_trace

EXPERT_BYTES = 2 * 3 * 2048 * 1408
LINK_BYTES_PER_S = 24e9
BUFFER_BYTES = 19.5e9
TPOT = {"MoE-Infinity": (0.155, 0.051), "DeepSpeed": (0.737, 0.513)}
"""Seconds for each token, and those in which the GPU is idle."""
PROMPT, ANSWER, REQUESTS, WARM = 512, 32, 9, 3


@cache
def requests() -> RoutingTrace | None:
    """Requests of all tasks, one task after the other."""
    return public_trace(*ESFT)


def rows(trace: RoutingTrace) -> list[NDArray[np.int64]]:
    """Of the steps: a prompt at once, then its answer token by token; tasks in turn."""
    size, found = PROMPT + ANSWER, []
    starts = np.linspace(0, trace.num_tokens, len(ESFT), endpoint=False).astype(int)
    for request in range(REQUESTS):
        first = int(starts[request % len(ESFT)]) + request // len(ESFT) * size
        found.append(np.arange(first, first + PROMPT))
        found += [np.array([t]) for t in range(first + PROMPT, first + size)]
    return found


@cache
def replayed(system: str, busy_s: float, buffer_bytes: float, capacity: int = 120) -> Replayed | None:
    """Requests one after another."""
    trace = requests()
    if trace is None:
        return None
    policies = {
        "MoE-Infinity": PolicySet(ActivationAware(), EAMMatch(capacity), ByActivity()),
        "DeepSpeed": PolicySet.of("prefetch_all"),
        "on demand": PolicySet(LRUDevice()),
    }[system]
    steps, times = rows(trace), UnitTimes(EXPERT_BYTES, LINK_BYTES_PER_S)
    return replay(
        trace, steps, times, int(buffer_bytes / EXPERT_BYTES), policies, layer_s=busy_s / trace.num_layers,
        is_prefill_S=[len(row) > 1 for row in steps],
    )  # fmt: skip


def idle_s(system: str, busy_s: float, buffer_bytes: float = BUFFER_BYTES, capacity: int = 120) -> float | None:
    """Seconds of a token in which the GPU waits for experts."""
    found = replayed(system, busy_s, buffer_bytes, capacity)
    if found is None:
        return None
    by_request_RS = found.seconds_S.reshape(REQUESTS, 1 + ANSWER)
    return float(by_request_RS[WARM:, 1:].mean()) - busy_s


def claims() -> list[Claim]:
    """Waiting, with short and long contexts."""
    absent = "" if requests() else ABSENT
    narrow = (
        absent or "the captured tasks are narrow: an LRU of the two thirds of experts that fit hits 5 of 6 uses; the "
    )
    narrow += "" if absent else "paper's 290 tasks spread wider"
    rate = absent or "as if its copies ran at 16 of 24 GB/s: what the framework does between copies is not modelled"
    where = "table 4, DeepSeek-V2-Lite"
    busy = {name: tpot - idle for name, (tpot, idle) in TPOT.items()}
    ours = {name: idle_s(name, busy[name]) for name in TPOT}
    small = idle_s("on demand", 0.16, 1e9)
    found = []
    for name, (tpot, idle) in TPOT.items():
        mine = ours[name]
        reason = narrow if name == "MoE-Infinity" else rate
        found += [
            Claim(f"{name}: GPU idle", where, idle, mine, "s", 0.2, because=reason),
            Claim(f"{name}: time for each token", where, tpot, None if mine is None else busy[name] + mine, "s", 0.2,
                  because=reason),
        ]  # fmt: skip
    ratio = None if absent else (busy["DeepSpeed"] + ours["DeepSpeed"]) / (busy["MoE-Infinity"] + ours["MoE-Infinity"])
    demand = idle_s("on demand", busy["MoE-Infinity"])
    return [
        *found,
        Claim("DeepSpeed over MoE-Infinity", where, 737 / 155, ratio, "ratio", 0.2, because=absent),
        Claim("on demand at 128 K tokens, 1 GB for experts", "long contexts", 0.137, small, "s", 0.2, because=absent),
        Claim("LRU on demand: GPU idle", where, None, demand, "s", because=absent),
        Claim("idle with 1000 matrices over with 120", "collection size", "0.95 to 1.05",
              None if absent else idle_s("MoE-Infinity", busy["MoE-Infinity"], capacity=1000) / ours["MoE-Infinity"],
              "ratio", because=absent),
    ]  # fmt: skip
