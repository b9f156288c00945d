"""Expert capacity: Switch (arXiv 2101.03961), Expert Choice (arXiv 2202.09368) and buffer overflow (arXiv 2402.05526).

Question: what does it cost, and whom does it hurt, that an expert takes only so many tokens?

Setting: Switch's table on 32 TPU v3 cores, 128 experts in every second layer, as a line in the rows that experts are
padded to. And the packaged trace (top-8 of 64) on `hgx-h100` with OLMoE-1B-7B's sizes; it has gate weights of the
chosen experts only, so its first choices are real, and the others' scores are drawn (`with_scores`) where a rule needs
them.

Lever: capacity factor; who comes first to an expert; experts that choose tokens; groups that compete for places.

Expected before the first run: examples per second of top-1 at two capacity factors give a line that all others lie on.
Experts that choose tokens are evenly loaded, and so faster than top-2. A request loses its expert to an adversary in
front of it always, by lot sometimes, and never where each request has places of its own.

Cannot speak about: quality, and so time to a loss; what a trained attack finds beside copies of the victim's token.
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
from moesim.routing.scores import with_scores
from moesim.routing.variants import Routed, softmax, top_k
from moesim.study import Claim

Floats = NDArray[np.float64]
TABLE = "table of speed and quality"
EXAMPLES_PER_S = {1: {1.0: 1000.0, 1.25: 910.0, 2.0: 860.0}, 2: {1.0: 860.0, 1.25: 790.0, 2.0: 840.0}}
"""k -> capacity factor -> examples per second."""
FITTED = ((1, 1.0), (1, 2.0))
TOKENS, GPUS = 2048, 8


def examples_per_s(k: int, factor: float) -> float:
    """A line in the padded rows per token, k times the capacity factor, through the two fitted cells."""
    (one, two), row = (k * factor for k, factor in FITTED), EXAMPLES_PER_S[1]
    slope = (1 / row[2.0] - 1 / row[1.0]) / (two - one)
    return 1 / (1 / row[1.0] + slope * (k * factor - one))


def switch_table() -> list[Claim]:
    """Two cells fitted, four predicted."""
    order = "the table's own top-2 rows are out of order: 790 with 1.25 places is slower than 840 with 2.0"
    because = {
        (1, 1.25): "the table's step from 1 to 1.25 costs more than that from 1.25 to 2; a cost of rows alone is even",
        (2, 2.0): f"{order}; twice the rows of 1.0 cannot be nearly as fast",
    }
    found = []
    for k, row in EXAMPLES_PER_S.items():
        for factor, paper in row.items():
            fitted = "seconds of an example: without rows, and for each row" if (k, factor) in FITTED else ""
            found.append(
                Claim(
                    f"top-{k}, capacity factor {factor}: examples per second", TABLE, paper,
                    examples_per_s(k, factor), "", 0.05, fitted=fitted, because=because.get((k, factor), ""),
                )
            )  # fmt: skip
    return found


# Real routing


@cache
def scores() -> Floats:
    """Log gate weights of the packaged trace's first tokens, unchosen experts drawn; [L, T, E]."""
    trace = load_trace("olmoe-shape-16x64").take(slice(TOKENS))
    even_LE = np.ones((trace.num_layers, trace.num_experts))
    scores_TLE = with_scores(trace, even_LE, np.random.default_rng(0)).scores_TLE
    assert scores_TLE is not None
    return np.asarray(scores_TLE.swapaxes(0, 1), np.float64)


def effects(routed: Routed) -> LayerEffects:
    """Of an OLMoE layer over eight GPUs."""
    model = load_model("olmoe-1b-7b")
    return layer_effects(routed, model.experts, model.hidden_size, load_cluster("hgx-h100"), GPUS)


def dropped_fraction(k: int, factor: float) -> float:
    """Share of the choices that find no place, mean over layers."""
    places = capacity(factor, TOKENS, k, scores().shape[2])
    return float(np.mean([capped(top_k(s_TE, k), s_TE, places).dropped_TE.sum() / (k * TOKENS) for s_TE in scores()]))


def kept_weight(order: str, factor: float = 0.5) -> float:
    """Share of the first choices' probability that is computed with half the places."""
    kept, places = [], capacity(factor, TOKENS, 1, scores().shape[2])
    for s_TE in scores():
        routed, probability_TE = top_k(s_TE, 1), softmax(s_TE)
        found = capped(routed, s_TE, places, order)
        kept.append(probability_TE[found.chosen_TE].sum() / probability_TE[routed.chosen_TE].sum())
    return float(np.mean(kept))


def choosing() -> list[Claim]:
    """Experts that choose tokens beside top-2, both with two experts for a token in the mean."""
    both = [(effects(top_k(s_TE, 2)), effects(expert_choice(s_TE, TOKENS * 2 // s_TE.shape[1]))) for s_TE in scores()]
    top, chosen = ([pair[i] for pair in both] for i in (0, 1))
    ratio = float(np.mean([t.seconds for t in top]) / np.mean([c.seconds for c in chosen]))
    return [
        Claim("expert choice: busiest rank over the mean", "by construction", 1.0,
              max(c.rank_imbalance for c in chosen), "ratio", 1e-9),
        Claim("top-2 over expert choice: time of a MoE layer", "recalled: a step a fifth shorter than GShard's", "> 1",
              ratio, "ratio"),
        Claim("top-2 over expert choice: messages between GPUs", "not in the paper", None,
              float(np.mean([t.rank_messages for t in top]) / np.mean([c.rank_messages for c in chosen])), "ratio",
              because="a prediction"),
    ]  # fmt: skip


# Buffer overflow


def lost_fraction(order: str, factor: float, is_grouped: bool, mates: int = 63) -> float:
    """How often a token loses its first choice when all of the batch before it copies it; over 32 tokens, 16 layers."""
    lost = []
    for victim, layer in np.ndindex(32, len(scores())):
        batch_TE = np.repeat(scores()[layer, [victim * 61]], mates + 1, axis=0)
        group_T = np.arange(mates + 1) if is_grouped else None
        places = capacity(factor, mates + 1, 1, batch_TE.shape[1])
        found = capped(top_k(batch_TE, 1), batch_TE, places, order, group_T, seed=victim * len(scores()) + layer)
        lost.append(found.dropped_TE[-1].any())
    return float(np.mean(lost))


def overflow() -> list[Claim]:
    """The victim is last in a batch of 64; an expert has two places with a factor of 2."""
    where = "attack and defences"
    return [
        Claim("victims that lose their expert, earlier tokens first", where, 1.0, lost_fraction("position", 2.0, False),
              "fraction", 0.01),
        Claim("victims that lose their expert, by lot", where, "< 1", lost_fraction("random", 2.0, False), "fraction"),
        Claim("the same with 16 times the places", where, "< 1",
              lost_fraction("random", 32.0, False) / lost_fraction("random", 2.0, False), "ratio"),
        Claim("victims that lose it with places for the whole batch", where, "<= 0",
              lost_fraction("position", 64.0, False), "fraction"),
        Claim("victims that lose it with places for each request", where, "<= 0", lost_fraction("position", 2.0, True),
              "fraction"),
    ]  # fmt: skip


def claims() -> list[Claim]:
    """Table, drops, who comes first, who chooses, who is hurt."""
    drops = {factor: dropped_fraction(2, factor) for factor in (1.0, 1.25, 2.0)}
    return [
        *switch_table(),
        Claim("top-2: choices dropped with 2.0 places over those with 1.0", "by construction", "< 1",
              drops[2.0] / drops[1.0], "ratio"),
        Claim("top-2: share of the choices dropped with 1.25 places", "not at hand", None, drops[1.25], "fraction",
              because=f"a prediction for real routing; {drops[1.0]:.1%} with 1.0 places, {drops[2.0]:.1%} with 2.0"),
        Claim("best tokens first over first come: gate weight that half the places keep", "V-MoE, recalled", "> 1",
              kept_weight("priority") / kept_weight("position"), "ratio"),
        *choosing(), *overflow(),
    ]  # fmt: skip
