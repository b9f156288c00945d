"""Speculative MoE: requests start on the rank where their experts are (arXiv 2503.04398).

Question: How many more choices are local when experts and requests are clustered together?

Setting: The paper has 8 GPUs of one node, DeepSeek-V2-Lite and Qwen3-30B-A3B, SGLang with DeepEP; a fifth of the data
makes its tables. Here DeepSeek-V2-Lite's real routing (three tasks, 26 layers of 64 experts, top 6) on 8 ranks: experts
are clustered by a fifth of the requests; the others go to the rank where most of their prompt's choices are, each rank
as many.

Lever: contiguous experts with requests in turn, or both clustered together.

Expected before the first run: The local share rises by more than the paper's 37 %, since three tasks are easier to tell
apart than chats are, and the load is less even than with EPLB.

Cannot speak about: throughput under objectives of latency; predictions from token numbers; shuffled collectives.
"""

from __future__ import annotations

import numpy as np

from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.methods.coclustering import CoClustering
from moesim.optimize.problem import Ints, Problem
from moesim.optimize.score import in_groups_LEG, scored
from moesim.policies.placement import Contiguous, Eplb
from moesim.study import ABSENT, ESFT, Claim, public_trace, split


def claims() -> list[Claim]:
    """Local share and load, on requests that the clusters were not made by."""
    trace, ranks = public_trace(*ESFT), 8
    problem = Problem.even(64, ranks, ranks)
    ours: dict[str, float] = {}
    if trace is not None:
        fit, held = (Demand.of(trace, rows, 1024) for rows in split(trace, 1 / 5))
        method = CoClustering()
        theirs = method.place(problem, fit, Clock())
        plain = Contiguous().place(64, ranks, ranks, fit.load_LE).slot_expert_LP
        local = {"theirs": _local(problem, theirs, held, True), "plain": _local(problem, plain, held, False)}
        ours = {
            "local": local["theirs"] / local["plain"],
            "alone": _local(problem, plain, held, True) / local["plain"],
            "share": local["theirs"],
            "load": scored(problem, theirs, held).steps / scored(problem, plain, held).steps,
            "eplb": scored(problem, Eplb().place(64, ranks, ranks, fit.load_LE).slot_expert_LP, held).steps,
            "steps": scored(problem, theirs, held).steps,
        }
    nothing = "" if ours else ABSENT
    uneven = "clusters hold a task's experts, and a step of one task fills its ranks: their purpose here costs evenness"
    return [
        Claim("local activations over contiguous", "DeepSeek-V2-Lite and Qwen3: +37 and +43 %", "1.37 to 1.43",
              ours.get("local"), "ratio", 0.1, because=nothing),
        Claim("fullest rank over contiguous", "imbalance is better than the best baseline's", "< 1", ours.get("load"),
              "ratio", because=nothing or uneven),
        Claim("local activations, requests placed alone", "no figure of the paper", None, ours.get("alone"), "ratio",
              because=nothing),
        Claim("share of activations that are local", "no figure of the paper", None, ours.get("share"), "fraction",
              because=nothing),
        Claim("fullest rank over the mean, clustered", "no figure of the paper", None, ours.get("steps"), "ratio",
              because=nothing),
        Claim("fullest rank over the mean, EPLB", "no figure of the paper", None, ours.get("eplb"), "ratio",
              because=nothing),
        Claim("throughput under objectives, DeepSeek-V2-Lite", "over SGLang, TTFT", 1.31, None, "ratio", 0.1,
              because="requests with a home rank by their experts are not in services"),
    ]  # fmt: skip


def _local(problem: Problem, slot_LP: Ints, demand: Demand, is_chosen: bool) -> float:
    """Share of choices on the request's own rank: where most of them are (as long as there is room), or in turn."""
    requests, number_T = np.unique(demand.request_T, return_inverse=True)
    at_LER = in_groups_LEG(problem, slot_LP, "rank").astype(np.float32)
    local_QR = np.zeros((len(requests), problem.num_ranks), np.float32)
    for layer, at_ER in enumerate(at_LER):
        np.add.at(local_QR, number_T, at_ER[demand.ids_TLK[:, layer]].sum(axis=1))
    rank_Q = (
        CoClustering.homes(local_QR, problem.num_ranks) if is_chosen else np.arange(len(requests)) % problem.num_ranks
    )
    return float(local_QR[np.arange(len(requests)), rank_Q].sum() / local_QR.sum())
