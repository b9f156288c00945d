"""AdapMoE (arXiv 2408.10284): slots shared out over layers by a dynamic programme, and one expert where it does.

Question: how many loads on demand does a cache save whose slots follow how well each layer is predicted?

Setting: Mixtral-8x7B with 64 of 256 experts cached, guesses and single experts as often, layer by layer, as the
authors' repository has measured; experts are alike otherwise, as in their formula. The replay has made-up routing of
that accuracy, every token with two experts.

Lever: even slots, or those of the programme.

Expected before the first run: the programme saves a tenth to a fifth of the expected loads, and the replay shows no
more than that. A quarter of token-layers with one expert are an eighth fewer runs, not a quarter.

Cannot speak about: the 1.35 times of its abstract, whose machine is not at hand; quality.
"""

from __future__ import annotations

import numpy as np

from moesim.offload.replay import PolicySet, UnitTimes, replay
from moesim.policies.cache import LRU, SlotsByLoads
from moesim.policies.predictor import OracleStated
from moesim.policies.prefetch import LookFurther
from moesim.policies.view import View
from moesim.routing.synthetic import sticky_trace
from moesim.study import Claim

LAYERS, EXPERTS, K, SLOTS = 32, 8, 2, 64
POLICY = SlotsByLoads()


def expected(slots_L: np.ndarray) -> float:
    """Loads on demand of one token."""
    return float(sum(POLICY.loads_T(layer, EXPERTS, K)[t] for layer, t in enumerate(slots_L)))


def replayed_s(policy: LRU | SlotsByLoads) -> float:
    """Seconds of a token where a copy takes one millisecond and a layer half of one."""
    trace = sticky_trace(LAYERS, EXPERTS, K, stickiness=0.07, num_tokens=60)
    policies = PolicySet(policy, OracleStated((1.0,), POLICY.accuracy_L), LookFurther())
    rows = [np.array([t]) for t in range(60)]
    found = replay(trace, rows, UnitTimes(1.0, 1e3), SLOTS, policies, layer_s=0.5e-3)
    return float(found.seconds_S[5:].mean())


def claims() -> list[Claim]:
    """Inputs, loads, time."""
    view = View(LAYERS, EXPERTS, K)
    even, programme = LRU().slots_L(SLOTS, view), POLICY.slots_L(SLOTS, view)
    single = float(np.mean(POLICY.single_L))
    half = "a quarter of token-layers run one expert in place of two, which is half as many fewer runs"
    return [
        Claim("accuracy of guesses, layers 1 to 31, mean", "repository", 0.866, float(np.mean(POLICY.accuracy_L[1:])),
              "fraction", 0.01),
        Claim("token-layers with one expert", "repository", 0.248, single, "fraction", 0.01),
        Claim("fewer runs of experts", "abstract", 0.25, single / K, "fraction", 0.1, because=half),
        Claim("expected loads, programme over even", "not at hand", None,
              expected(programme) / expected(even), "ratio"),
        Claim("the programme never loads more than even slots", "section IV-C", "<= 1",
              expected(programme) / expected(even), "ratio"),
        Claim("time of a token, even over programme", "not at hand", None,
              replayed_s(LRU()) / replayed_s(POLICY), "ratio"),
    ]  # fmt: skip
