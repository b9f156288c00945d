"""Orders in Chaos: placing experts for decoding by what prompts used (arXiv 2510.05497).

Question: How much faster is decoding where experts lie by the counts of the prompts?

Setting: The paper has 8 H100, large models and its own traces. Here: prompts and answers of 64 requests to the tiny
model of OLMoE-1B-7B's shape (16 layers of 64 experts) that is trained and captured here, on 8 ranks; a step is 256
generated tokens. A MoE layer takes as long as its fullest rank, which is so where experts compute rather than wait for
weights.

Lever: the placement: contiguous; remapped by the prompts' counts with as many experts on each rank; one further slot on
each rank (duplicated); an oracle that knows each step.

Expected before the first run: The gain is what contiguous placement loses to imbalance, 10 to 20 %; duplicates gain
more than remapping in principle, but prompts say less of the answers than the answers themselves, so neither is within
10 % of the oracle everywhere.

Cannot speak about: wafer-scale chips, whose meshes and predictors are not modelled; the paper's own models.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moesim.files.scenarios import load_trace
from moesim.optimize.demand import Demand
from moesim.optimize.place import oracle_steps
from moesim.optimize.problem import Problem
from moesim.optimize.score import scored
from moesim.optimize.search import most_even
from moesim.policies.placement import Contiguous
from moesim.study import Claim


def claims() -> list[Claim]:
    """Speed of MoE layers while decoding, over contiguous."""
    trace = load_trace("olmoe-shape-16x64")
    prompts, answers = (Demand.of(trace, np.flatnonzero(rows), 256) for rows in (~trace.is_decode_T, trace.is_decode_T))
    plain = Problem.even(64, 8, 8)
    more = replace(plain, slots_R=plain.slots_R + 1)
    contiguous = Contiguous().place(64, 8, 8, prompts.load_LE).slot_expert_LP
    full = {
        "contiguous": scored(plain, contiguous, answers).steps,
        "remapped": scored(plain, most_even(plain, prompts.load_LE), answers).steps,
        "duplicated": scored(more, most_even(more, prompts.load_LE), answers).steps,
        "by the answers": scored(plain, most_even(plain, answers.load_LE), answers).steps,
        "oracle": oracle_steps(more, answers.load_SLE),
    }
    gain = {name: full["contiguous"] / value for name, value in full.items()}
    where = "8 x H100 case study"
    mild = "this trace is less skewed: contiguous loses no more than the oracle gains, most of it noise of single steps"
    return [
        Claim("faster by remapping", where, 1.155, gain["remapped"], "ratio", 0.05, because=mild),
        Claim("faster by one duplicate on each GPU", where, 1.125, gain["duplicated"], "ratio", 0.05, because=mild),
        Claim("remapped over the oracle", where, ">= 0.9", gain["remapped"] / gain["oracle"], "ratio"),
        Claim("duplicated over the oracle", where, ">= 0.9", gain["duplicated"] / gain["oracle"], "ratio"),
        Claim("faster by the answers' own counts", "no figure of the paper", None, gain["by the answers"], "ratio"),
        Claim("faster by the oracle", "no figure of the paper", None, gain["oracle"], "ratio"),
        Claim("mean speed-up on a wafer of 5 x 5 chips, DeepSeek-V3", "abstract", 6.3, None, "ratio", 0.1,
              because="meshes of chips with data that moves beside tasks are not modelled"),
    ]  # fmt: skip
