"""Expert capacity: Switch (arXiv 2101.03961), Expert Choice (arXiv 2202.09368), and what a batch mate can do.

Question: what do padded experts cost, what do they drop on real routing, and when does the routing of one request
depend on those beside it (Hayes et al., arXiv 2402.05526)?

Setting: Switch and top-2 MoE of T5-Base's size on 32 TPU v3 cores, 128 experts, as published; and the packaged trace
(64 experts, recorded gate weights), 64 requests of 16 tokens in a batch, top-2. Machine time on `hgx-h100`, OLMoE's
sizes.

Lever: capacity factor, k, order of filling, expert choice.

Expected before the first run: a step has a part of its own and one in proportion to the rows that experts are padded
to, so that the speeds of Switch at factors 1 and 2 give the others within a twentieth, and top-2 is Switch at twice
the factor. Expert choice is even. Any order over a whole batch lets mates change a request's routing, places for each
request or for everyone never.

Cannot speak about: convergence, where Expert Choice gains most; whether an attack can steer what it changes.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from moesim.costs.moe_layer import LayerEffects, layer_effects
from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.scenarios import load_trace
from moesim.routing.capacity import capacity, capped, expert_choice
from moesim.routing.scores import gate_weights_TE
from moesim.routing.variants import Routed, top_k
from moesim.study import Claim

SWITCH = {1.0: 1000.0, 1.25: 910.0, 2.0: 860.0}
"""Capacity factor -> examples a second, top-1."""
TOP2 = {1.0: 860.0, 1.25: 790.0, 2.0: 840.0}
"""The same with top-2."""
LAYERS = (0, 5, 10, 15)
TOKENS = 16
"""Of each request."""


def examples_per_s(rows: float) -> float:
    """With experts padded to that many rows per token: the line through Switch at factors 1 and 2."""
    rate = 1 / SWITCH[2.0] - 1 / SWITCH[1.0]
    return 1 / (1 / SWITCH[1.0] + rate * (rows - 1))


@cache
def batch(layer: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Gate weights of the first tokens of every request in turn, and the request of each."""
    trace = load_trace("olmoe-shape-16x64")
    first = np.flatnonzero(np.diff(trace.request_T, prepend=-1))
    rows = (first[:, None] + np.arange(TOKENS)).ravel()
    return gate_weights_TE(trace, layer)[rows], np.repeat(np.arange(len(first)), TOKENS)


def dropped(factor: float, order: str) -> tuple[float, float]:
    """Share of the top-2 choices that are dropped, and of their gate weight."""
    lost, weight = [], []
    for layer in LAYERS:
        scores_TE, _request_T = batch(layer)
        routed = top_k(scores_TE, 2)
        found = capped(routed, scores_TE, capacity(factor, len(scores_TE), 2, 64), order)
        lost.append(found.dropped_TE.sum() / routed.chosen_TE.sum())
        weight.append(scores_TE[found.dropped_TE].sum() / scores_TE[routed.chosen_TE].sum())
    return float(np.mean(lost)), float(np.mean(weight))


def changed(order: str, factor: float = 1.0, per_request: bool = False) -> float:
    """Share of requests that are routed otherwise when the other half of their batch is other requests."""
    differ = []
    for layer in LAYERS:
        scores_TE, request_T = batch(layer)
        mine = request_T < 16
        kept = []
        for low in (16, 40):
            rows = np.flatnonzero(mine | ((request_T >= low) & (request_T < low + 24)))
            rows = np.r_[rows[request_T[rows] >= 16], rows[request_T[rows] < 16]]  # mates come first
            places = capacity(factor, TOKENS if per_request else len(rows), 2, 64)
            group_T = request_T[rows] if per_request else None
            found = capped(top_k(scores_TE[rows], 2), scores_TE[rows], places, order, group_T)
            kept.append(found.chosen_TE[-mine.sum() :])
        differ.append((kept[0] != kept[1]).reshape(16, -1).any(axis=1).mean())
    return float(np.mean(differ))


def lost(order: str, factor: float, per_request: bool = False) -> float:
    """How often a token loses its only expert to 63 copies of itself that come before it, one request each."""
    found = []
    for layer in LAYERS:
        scores_TE, _request_T = batch(layer)
        for victim in range(0, len(scores_TE), 31):
            copies_TE = np.repeat(scores_TE[[victim]], 64, axis=0)
            group_T = np.arange(64) if per_request else None
            places = capacity(factor, 64, 1, 64)
            kept = capped(top_k(copies_TE, 1), copies_TE, places, order, group_T, seed=4096 * layer + victim)
            found.append(not kept.chosen_TE[-1].any())
    return float(np.mean(found))


def effects(routed: Routed) -> LayerEffects:
    """Of a layer of OLMoE's sizes on eight H100."""
    model = load_model("olmoe-1b-7b")
    return layer_effects(routed, model.experts, model.hidden_size, load_cluster("hgx-h100"), 8)


def chosen_by_experts() -> tuple[float, float, float]:
    """Expert choice of as many choices as top-2: imbalance over ranks, speed of a layer over top-2, tokens left out."""
    found = []
    for layer in LAYERS:
        scores_TE, _request_T = batch(layer)
        even = expert_choice(scores_TE, capacity(1.0, len(scores_TE), 2, 64))
        mine, theirs = effects(even), effects(top_k(scores_TE, 2))
        found.append((mine.rank_imbalance, theirs.seconds / mine.seconds, (~even.chosen_TE.any(axis=1)).mean()))
    imbalance, speed, left_out = np.mean(found, axis=0)
    return float(imbalance), float(speed), float(left_out)


def claims() -> list[Claim]:
    """Speed, drops, expert choice, batch mates."""
    table, mates = "table of speeds", "the property"
    line = "half of the line through Switch at 1 and 2"
    falls = "published speed falls by 9 % for a quarter more rows and by 5 % for the next three quarters: not a line"
    rises = "published speed rises from factor 1.25 to 2, against the larger work: an oddity of the table"
    reading = "at 1024 tokens a layer mostly reads weights and starts exchanges, whoever gets the rows; and top-2 is "
    reading += "not padded here"
    imbalance, speed, left_out = chosen_by_experts()
    by_position, by_priority = dropped(1.0, "position"), dropped(1.0, "priority")
    return [
        *(Claim(f"Switch, factor {f}: examples a second", table, paper, examples_per_s(f), "", 0.05,
                fitted="" if f == 1.25 else line, because=falls if f == 1.25 else "") for f, paper in SWITCH.items()),
        *(Claim(f"top-2, factor {f}: examples a second", table, paper, examples_per_s(2 * f), "", 0.05,
                because=rises if f == 2.0 else "")
          for f, paper in TOP2.items()),
        Claim("expert choice: busiest rank over the mean", "method", 1.0, imbalance, "ratio", 1e-9),
        Claim("expert choice: speed of a layer over top-2", "recalled, of a step", 1.2, speed, "ratio", 0.1,
              because=reading),
        Claim("expert choice: tokens that no expert takes", "not in the paper", None, left_out, "fraction",
              because="the paper's routers were trained for it"),
        Claim("factor 1, top-2: choices dropped", "not in the paper", None, by_position[0], "fraction",
              because="no drop rates of the papers are at hand"),
        Claim("factor 1, top-2: gate weight dropped by priority over position", "V-MoE (arXiv 2106.05974)", "< 1",
              by_priority[1] / by_position[1], "ratio"),
        *(Claim(f"places for the batch, by {order}: requests whose routing mates change", mates, "> 0", changed(order),
                "fraction") for order in ("position", "choice", "priority", "random")),
        Claim("a token behind 63 copies of itself loses its expert, by position", mates, 1.0, lost("position", 2.0),
              "fraction", 0.01),
        Claim("the same, by lot", mates, "< 1", lost("random", 2.0), "fraction"),
        Claim("the same by lot, with 16 times the places over that", mates, "< 1",
              lost("random", 32.0) / lost("random", 2.0), "ratio"),
        Claim("the same with places for each request", mates, "<= 0", lost("position", 2.0, per_request=True),
              "fraction"),
        Claim("places for each request: requests whose routing mates change", mates, "<= 0",
              changed("position", per_request=True), "fraction"),
        Claim("places for everyone: requests whose routing mates change", mates, "<= 0", changed("position", 32.0),
              "fraction"),
    ]  # fmt: skip
