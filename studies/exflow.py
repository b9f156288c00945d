"""ExFlow: placing experts so that tokens stay on their GPU between layers (arXiv 2401.08383).

Question: How many of a token's moves between GPUs does a placement by inter-layer affinity save?

Setting: The paper publishes placements of Mixtral-8x7B (8 experts, 32 layers, first choices) on 4 and 8 GPUs with
their cost in moves per token, and figures of GPT models of 64 experts. No token-level routing of Mixtral is at hand:
chance is computed on made-up routing of its shape, and savings on real routing of DeepSeek-V2-Lite (26 layers of 64
experts, first choices, three tasks), one half of the requests to place by and the other to count.

Lever: the placement: ExFlow's integer programme (by layers in turn, where 64 experts make it too large), or chance.

Expected before the first run: Chance is exact. Savings of the same size as the paper's for 64 experts, somewhat less,
since its model was trained with few tokens per expert; the load it leaves is uneven.

Cannot speak about: seconds (context-coherent parallelism has no all-to-all back, which no set-up here lowers), and
Mixtral's own affinity.

Slow: a quarter of a minute of integer programmes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.methods.exflow import ExFlow
from moesim.optimize.methods.shuffled import Shuffled
from moesim.optimize.problem import Problem, Weights
from moesim.optimize.score import left_fraction, scored
from moesim.optimize.search import Caps, annealed
from moesim.routing.synthetic import topic_trace
from moesim.study import ABSENT, ESFT, Claim, public_trace, split

PUBLISHED = {4: (23.25, 17.4953), 8: (27.125, 22.1660)}
"""GPUs -> moves of a token over 31 transitions: by chance, and of the published placement."""


def claims() -> list[Claim]:
    """Chance on Mixtral's shape; savings on real routing."""
    shape = topic_trace(32, 8, 1, num_topics=4, concentration=0.5, num_requests=32, tokens=16)
    of_shape, found = Demand.of(shape), []
    for gpus, (chance, _) in PUBLISHED.items():
        problem = Problem.even(8, gpus, gpus)
        moves = [
            31 * left_fraction(problem, Shuffled(seed).place(problem, of_shape, Clock()), of_shape, "rank")
            for seed in range(20)
        ]
        found.append(
            Claim(f"moves of a token, random placement, {gpus} GPUs", "published placements", chance,
                  float(np.mean(moves)), tolerance=0.02)
        )  # fmt: skip
    found += [
        Claim(f"moves of a token, published placement, {gpus} GPUs", "published placements", theirs, None,
              tolerance=0.05,
              because="its cost needs the tokens that it was solved for, and no routing of Mixtral's tokens is public")
        for gpus, (_, theirs) in PUBLISHED.items()
    ]  # fmt: skip
    saved = _savings()
    coarse = "8 experts of broad text, 1 or 2 on a GPU, against 64 of narrow tasks, 8 or 16 on a GPU"
    narrow = "narrow tasks have affinities of their own: see what is left on a task that it was not made for"
    for says, where, paper, key, because in (
        ("moves saved, 4 GPUs", "published placements", 1 - 17.4953 / 23.25, "saved 4", coarse),
        ("moves saved, 8 GPUs", "published placements", 1 - 22.1660 / 27.125, "saved 8", coarse),
        ("moves saved with 64 experts, 4 GPUs", "its GPT model of 64 experts", 0.40, "saved 4", narrow),
        ("moves saved with 64 experts, 32 GPUs", "its GPT model of 64 experts", 0.25, "saved 32", narrow),
    ):
        ours = saved.get(key)
        found.append(Claim(says, where, paper, ours, "fraction", 0.25, because=because if ours is not None else ABSENT))
    for says, key in (
        ("moves saved on a task that it was not made for, 4 GPUs", "other 4"),
        ("moves saved on a task that it was not made for, 32 GPUs", "other 32"),
        ("fullest GPU over the mean, its placement, 8 GPUs", "load 8"),
        ("moves saved by annealing at 5 % slack, 8 GPUs", "annealed 8"),
        ("fullest GPU over the mean, annealed, 8 GPUs", "annealed load 8"),
    ):
        found.append(Claim(says, "no figure of the paper", None, saved.get(key), because="" if saved else ABSENT))
    return found


def _savings() -> dict[str, float]:
    """On requests held out: what is saved of the moves by chance, and how uneven the load is."""
    trace = public_trace(*ESFT)
    if trace is None:
        return {}
    first = replace(trace, expert_ids_TLK=trace.expert_ids_TLK[:, :, :1], weights_TLK=None, predicted_HTLW=())
    requests = np.unique(trace.request_T)
    is_last = np.isin(trace.request_T, requests[-len(requests) // 3 :])  # of three tasks, one after the other
    fit, held = (Demand.of(first, rows) for rows in split(trace))
    two, last = (Demand.of(first, np.flatnonzero(rows)) for rows in (~is_last, is_last))
    found = {}
    for gpus in (4, 8, 32):
        problem = Problem.even(64, gpus, min(gpus, 4), weights=Weights(load=0.0, rank=1.0))
        theirs = scored(problem, ExFlow(limit_s=4).place(problem, fit, Clock(60)), held)
        other = scored(problem, ExFlow(limit_s=4).place(problem, two, Clock(60)), last)
        chance = 1 - 1 / gpus
        found[f"saved {gpus}"], found[f"load {gpus}"] = 1 - theirs.rank / chance, theirs.load
        found[f"other {gpus}"] = 1 - other.rank / chance
        ours_LP = annealed(problem, fit, Clock(60))
        assert Caps.of(problem, fit.load_LE).exceeded_by(problem, ours_LP, fit.load_LE) == 0
        ours = scored(problem, ours_LP, held)
        found[f"annealed {gpus}"], found[f"annealed load {gpus}"] = 1 - ours.rank / chance, ours.load
    return found
