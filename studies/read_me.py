"""Read-ME (arXiv 2410.19123): one router before the model, so that the experts of queued tokens are known.

Question: what does a cache hit that knows which experts queued requests will use, and how many experts does a batch
need that is made of tokens which want the same?

Setting: six experts, as the range of cache sizes suggests (their number is not at hand), one for each token and the
same in all layers. 4,096 tokens: 32 requests in turn, each of which keeps its expert for the next token with
probability 0.713, as 2,921 of 4,096 tokens do. Fitted: the tokens of a batch, to the unique experts of one baseline;
and how many tokens ahead Belady's cache knows, to its hits with room for 2.

Lever: Random, LRU or Belady at 2 to 5 experts; batches in order of arrival, or of the experts with the longest
queues.

Expected before the first run: Random and LRU hit as often as chance, since requests in turn hide what each repeats;
Belady within a few points (it came out 5 to 7 points higher with all of the future, so what is queued is fitted now).
Batches by expert need fewer experts than published, whose queues are shorter than ours.

Cannot speak about: latencies, which need the kernels of its models; quality.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from moesim.offload.hits import hit_rates_C
from moesim.policies.cache import LRU, OracleBelady, Random
from moesim.policies.grouping import LongestQueue
from moesim.routing.synthetic import sticky_trace
from moesim.routing.trace import RoutingTrace
from moesim.study import Claim

EXPERTS, REQUESTS, TOKENS = 6, 32, 4096
REPEATS = 2921 / 4096
TABLE = {
    "Random": (0.3419, 0.5014, 0.6752, 0.8291),
    "LRU": (0.3390, 0.5242, 0.6695, 0.8348),
    "Belady": (0.4416, 0.6182, 0.7721, 0.8803),
}
"""Share of hits with room for 2, 3, 4 and 5 experts."""
ROOM = (2, 3, 4, 5)


@cache
def queued() -> RoutingTrace:
    """Tokens of all requests in turn."""
    stickiness = (REPEATS - 1 / EXPERTS) / (1 - 1 / EXPERTS)  # a new choice may fall on the same expert
    each = TOKENS // REQUESTS
    parts = [
        sticky_trace(1, EXPERTS, 1, stickiness=stickiness, num_tokens=each, seed=seed).expert_ids_TLK
        for seed in range(REQUESTS)
    ]
    whole = sticky_trace(1, EXPERTS, 1, stickiness=stickiness, num_tokens=each * REQUESTS)
    whole.expert_ids_TLK[:] = np.stack(parts, axis=1).reshape(-1, 1, 1)
    return whole


@cache
def hits_C(policy: Random | LRU | OracleBelady, room: tuple[int, ...] = ROOM) -> NDArray[np.float64]:
    """With room for 2 to 5 experts."""
    rows = [np.array([t]) for t in range(queued().num_tokens)]
    return hit_rates_C(queued(), rows, policy, room)


@cache
def fitted_lookahead() -> int:
    """Tokens ahead that give Belady's hits with room for 2."""
    wanted = TABLE["Belady"][0]
    return min(range(2, 20), key=lambda ahead: abs(float(hits_C(OracleBelady(ahead), (2,))[0]) - wanted))


def unique(tokens: int) -> float:
    """Experts of batches in order of arrival, mean."""
    ids = queued().expert_ids_TLK.ravel()
    return float(np.mean([len(set(ids[i : i + tokens].tolist())) for i in range(0, len(ids) - tokens + 1, tokens)]))


def fitted_tokens() -> int:
    """Tokens of a batch whose unique experts come nearest to 5.08."""
    return min(range(2, REQUESTS), key=lambda tokens: abs(unique(tokens) - 5.08))


def unique_by_queue(tokens: int) -> float:
    """Experts of batches that take the longest queue, then the next, until they are full; one token a request waits."""
    ids_SR = queued().expert_ids_TLK.reshape(-1, REQUESTS)
    at_R, found = np.zeros(REQUESTS, np.int64), []
    while (at_R < len(ids_SR)).all():
        waiting_R = ids_SR[at_R, np.arange(REQUESTS)]
        taken = LongestQueue().batch(waiting_R[:, None, None], EXPERTS, tokens)
        found.append(len(set(waiting_R[taken].tolist())))
        at_R[taken] += 1
    return float(np.mean(found))


def claims() -> list[Claim]:
    """Hits, and experts of a batch."""
    ahead = fitted_lookahead()
    policies = {"Random": Random(), "LRU": LRU(), "Belady": OracleBelady(ahead)}
    found = [
        Claim(f"{policy}, room for {room}", "table 3", paper, float(ours), "fraction", 0.05 / paper,
              fitted=f"{ahead} tokens ahead" if (policy, room) == ("Belady", 2) else "")
        for policy, papers in TABLE.items()
        for room, paper, ours in zip(ROOM, papers, hits_C(policies[policy]), strict=True)
    ]  # fmt: skip
    tokens = fitted_tokens()
    ids_TR = queued().expert_ids_TLK.reshape(-1, REQUESTS)
    repeats = float((ids_TR[1:] == ids_TR[:-1]).mean())
    longer = "with 32 requests waiting, the longest queue alone fills much of a batch; the paper's were shorter"
    return [
        Claim("tokens with the expert of the one before", "figure 5", REPEATS, repeats, "fraction", 0.05,
              fitted="stickiness"),
        *found,
        Claim("unique experts, decodes first", "table 4", 5.08, unique(tokens), "", 0.05,
              fitted=f"batches of {tokens}"),
        Claim("unique experts, prefills first", "table 4", 5.21, unique(tokens), "", 0.2),
        Claim("unique experts, by queue", "table 4", 3.51, unique_by_queue(tokens), "", 0.2, because=longer),
    ]  # fmt: skip
