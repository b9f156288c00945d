"""MoETuner: even clusters of experts, then clusters to GPUs, both by integer programmes (arXiv 2502.06643).

Question: How much shorter are the longest rank's work and the all-to-alls with its placement than in index order?

Setting: The paper has Mixtral-8x7B at EP4 on 4 of 8 H100 and on 2 nodes of H200, four text sets. No token-level routing
of Mixtral is at hand; here DeepSeek-V2-Lite's real routing (26 layers, 64 experts, three tasks) on 4 ranks, alone and
as 2 nodes of 2, half of the requests to place by and half to judge; steps of 1,024 tokens. A layer's experts take as
long as its fullest rank; an all-to-all as long as the most messages between two ranks.

Lever: the placement: contiguous (index order) or MoETuner's, with as many experts of each layer on every rank.

Expected before the first run: The fullest rank falls by what contiguous loses, near the paper's 36 and 27 %, if its
routing is as skewed; traffic between ranks changes little, as 64 experts in clusters by load have little affinity.

Cannot speak about: end-to-end seconds of its modified Megatron-LM; Mixtral's own skew; clusters of unlike size in a
layer.

Slow: a quarter of a minute of integer programmes.
"""

from __future__ import annotations

import numpy as np

from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.methods.moetuner import MoeTuner
from moesim.optimize.place import oracle_steps
from moesim.optimize.problem import Ints, Problem
from moesim.optimize.score import in_groups_LEG, scored
from moesim.policies.placement import Contiguous
from moesim.study import ABSENT, ESFT, Claim, public_trace, split

WHERE = "tail latencies, WikiText-103"


def claims() -> list[Claim]:
    """Load and traffic, theirs over contiguous, on requests held out."""
    ours = _measured()
    skew = "this trace is less skewed, 16 of 64 experts on a rank: what even an oracle of each step saves stands below"
    alike = "clusters are made by load alone, and moving whole clusters of 16 mixed experts keeps little affinity"
    rows = (
        ("token processing tail, one node: saved", 0.36, "load 1"),
        ("token processing tail, two nodes: saved", 0.27, "load 2"),
        ("all-to-all tail, one node: saved", 0.363, "most 1"),
        ("all-to-all tail, two nodes: saved", 0.305, "most 2"),
        ("all-to-all mean, one node: saved", 0.354, "mean 1"),
        ("all-to-all mean, two nodes: saved", 0.247, "mean 2"),
    )
    found = [
        Claim(
            says, WHERE, paper, ours.get(key), "fraction", 0.25,
            because=ABSENT if not ours else skew if key.startswith("load") else alike,
        )
        for says, paper, key in rows
    ]  # fmt: skip
    found.append(
        Claim("token processing tail: saved by an oracle of each step", "no figure of the paper", None,
              ours.get("oracle"), "fraction", because="" if ours else ABSENT)
    )  # fmt: skip
    for says, paper in (("faster end to end, one node", 1.093), ("faster end to end, two nodes", 1.175)):
        found.append(
            Claim(says, "mean of four text sets", paper, None, "ratio", 0.1, because="no routing of Mixtral's tokens")
        )
    return found


def _measured() -> dict[str, float]:
    trace = public_trace(*ESFT)
    if trace is None:
        return {}
    fit, held = (Demand.of(trace, rows, 1024) for rows in split(trace))
    found = {}
    for nodes in (1, 2):
        problem = Problem.even(64, 4, 4 // nodes)
        theirs = MoeTuner(limit_s=0.4).place(problem, fit, Clock())
        plain = Contiguous().place(64, 4, 4, fit.load_LE).slot_expert_LP
        before, after = scored(problem, plain, held), scored(problem, theirs, held)
        found[f"load {nodes}"] = 1 - after.steps / before.steps
        found["oracle"] = 1 - oracle_steps(problem, held.load_SLE) / before.steps
        most, mean = (_messages(problem, slots, held) for slots in (plain, theirs))
        found[f"most {nodes}"], found[f"mean {nodes}"] = 1 - mean[0] / most[0], 1 - mean[1] / most[1]
    return found


def _messages(problem: Problem, slot_LP: Ints, demand: Demand) -> tuple[float, float]:
    """Transitions between two ranks: of the fullest pair, mean of layers (links between nodes nine times as slow), and
    of all pairs."""
    groups = in_groups_LEG(problem, slot_LP, "rank")
    slow_RR = 1.0 + 8.0 * (problem.node_R[:, None] != problem.node_R)
    np.fill_diagonal(slow_RR, 0.0)
    each = [
        (here.T @ pairs_EE @ there) * slow_RR
        for here, there, pairs_EE in zip(groups[:-1], groups[1:], demand.next_LEE, strict=True)
    ]
    return float(np.mean([pairs_RR.max() for pairs_RR in each])), float(np.mean([pairs_RR.sum() for pairs_RR in each]))
