"""FineMoE, first called fMoE (arXiv 2502.05370): maps of past iterations, searched for the one that is most alike.

Question: how much oftener are experts on the GPU than with Mixtral-Offloading's and MoE-Infinity's policies, and what
does that bring a token?

Setting: an eighth of the experts fit, as 6 GB do of the three models' (6 to 24 %). Their routing is not public:
single tokens of DeepSeek-V2-Lite's capture (ESFT, three tasks in turn), where it lies beside the project; the maps
have only the scores of chosen experts, and no embeddings of prompts. Six links, as of six RTX 3090: copies are six
times as fast as one, and a layer computes as long as one copy over one link takes, which is assumed. Guesses of
Mixtral-Offloading are right with probability 0.87, as was measured of Mixtral.

Lever: predictor, prefetch and cache of each system; DeepSpeed is an LRU of all layers, on demand.

Expected before the first run: hits as published within a fifth. Times of a token gain less than published, since the
framework's own time, which is not at hand, counts there too.

Slow: fifteen seconds of replays.

Cannot speak about: times to the first token; ProMoE, whose predictors were not trained in the paper; absolute times.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from moesim.offload.replay import PolicySet, Replayed, UnitTimes, replay
from moesim.policies.cache import LRU, LRUDevice
from moesim.policies.predictor import OracleStated
from moesim.policies.prefetch import Speculative
from moesim.study import ABSENT, ESFT, Claim, public_trace

SHARE, LINKS, EACH = 1 / 8, 6, 100
COPY_S = 1e-3
"""Of an expert over one link: only ratios are claimed."""
HITS = {"Mixtral-Offloading": 1.14, "MoE-Infinity": 1.68}
"""FineMoE's hits over theirs."""
TPOT = {"DeepSpeed": 0.64, "Mixtral-Offloading": 0.75, "MoE-Infinity": 0.71}
"""FineMoE's time of a token over theirs with 6 GB."""
SYSTEMS = {
    "DeepSpeed": PolicySet(LRUDevice()),
    "Mixtral-Offloading": PolicySet(LRU(), OracleStated((0.87,)), Speculative()),
    "MoE-Infinity": PolicySet.of("moe_infinity"),
    "FineMoE": PolicySet.of("finemoe"),
}


@cache
def replayed(system: str) -> Replayed | None:
    """Runs of tokens of each task, twice."""
    trace = public_trace(*ESFT)
    if trace is None:
        return None
    starts = [trace.num_tokens * task // 3 + turn * EACH for turn in range(2) for task in range(3)]
    rows = [np.array([t]) for start in starts for t in range(start, start + EACH)]
    times = UnitTimes(1.0, LINKS / COPY_S, COPY_S / 20)
    slots = int(SHARE * trace.num_experts) * trace.num_layers
    return replay(trace, rows, times, slots, SYSTEMS[system], layer_s=COPY_S)


def claims() -> list[Claim]:
    """Hits and times, all relative."""
    absent, fine = ABSENT, replayed("FineMoE")
    shared = "what the frameworks do besides is not at hand; here a layer computes as long as one copy takes, and an "
    shared += "eighth of the experts, of a narrow capture, serves an LRU well"
    found = []
    for name, paper in HITS.items():
        other = replayed(name)
        ours = fine.uses.hit_rate / other.uses.hit_rate if fine and other else None
        found.append(
            Claim(f"hits over {name}'s", "hit rates, means", paper, ours, "ratio", 0.2, because="" if other else absent)
        )
    for name, paper in TPOT.items():
        other = replayed(name)
        ours = float(fine.seconds_S[3 * EACH :].mean() / other.seconds_S[3 * EACH :].mean()) if fine and other else None
        found.append(
            Claim(f"time of a token over {name}'s", "cache limit of 6 GB", paper, ours, "ratio", 0.2,
                  because=shared if other else absent)
        )  # fmt: skip
    return found
