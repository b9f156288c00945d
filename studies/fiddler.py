"""Fiddler (arXiv 2402.07033): popular experts on the GPU; of the others, the CPU computes what it computes sooner.

Question: how often is an expert on the GPU when the most popular ones were put there, and from how many tokens on is
it worth a copy?

Setting: Mixtral-8x7B in 16 bits, 56 of its 256 experts on a Quadro RTX 6000 (PCIe 3.0) or 125 on an RTX 6000 Ada
(PCIe 4.0). Popularity: public counts of layers 0, 7 and 15 over five kinds of text (the OLMoE authors'), where they
lie beside the project; these layers stand for all 32. Links move three quarters of their nominal bytes; CPUs (Xeon
6126, six channels of DDR4-2666; Xeon 8480+, eight of DDR5-4800) read at half of theirs.

Lever: experts on the GPU; popularity of the same texts, or of the others; tokens of an expert.

Expected before the first run: hits a few points above chance, since Mixtral's experts are nearly as popular as each
other. A copy is several times the CPU's time for one token.

Cannot speak about: tokens a second, which are those of its framework; its decoding of DeepSeek-V3 is in the study of
kTransformers.
"""

from __future__ import annotations

import csv
from functools import cache

import numpy as np
from numpy.typing import NDArray

from moesim.policies.executor import CPU, Fiddler, Work
from moesim.study import DATA, Claim

EXPERT_BYTES = 2 * 3 * 4096 * 14336
HITS = {56: 0.252, 125: 0.530}
"""Experts on the GPU -> published share of hits; chance gives 21.9 and 48.8 %."""
MACHINES = {
    "Quadro RTX 6000, Xeon 6126": (0.75 * 16e9, 0.5 * 6 * 21.3e9),
    "RTX 6000 Ada, Xeon 8480+": (0.75 * 32e9, 0.5 * 8 * 38.4e9),
}
"""Bytes a second of the link, and of the CPU."""
COUNTS = DATA / "routing_olmoe_mixtral_counts" / "expert_counts.csv"


@cache
def shares() -> dict[str, NDArray[np.float64]]:
    """Of the choices of each layer, by kind of text, [L, E]; empty without the counts."""
    if not COUNTS.is_file():
        return {}
    found: dict[str, NDArray[np.float64]] = {}
    with COUNTS.open() as file:
        for row in csv.DictReader(file):
            if row["model"] == "mixtral-8x7b" and row["which"] == "topk":
                count_LE = found.setdefault(row["domain"], np.zeros((3, 8)))
                count_LE[(0, 7, 15).index(int(row["layer"])), int(row["expert"])] += float(row["count"])
    return {kind: count_LE / count_LE.sum(axis=1, keepdims=True) for kind, count_LE in found.items()}


def hits(kept: int, knows_own: bool) -> float | None:
    """Of the most popular experts of the same texts, or of all other kinds; mean over kinds of text."""
    known = shares()
    if not known:
        return None
    places, found = kept / 256 * 24, []
    for kind, own_LE in known.items():
        popular_LE = own_LE if knows_own else sum(s for other, s in known.items() if other != kind)
        best = own_LE.ravel()[np.argsort(-np.asarray(popular_LE).ravel(), kind="stable")]
        whole = int(places)
        found.append(float(best[:whole].sum() + (places - whole) * best[whole]) / len(own_LE))
    return float(np.mean(found))


def copied_from(machine: str) -> int:
    """Tokens of an expert from which on it is copied: the CPU's time grows with every token, as the paper has it."""
    link, cpu = MACHINES[machine]
    load, no = np.arange(1, 200), np.zeros(199, np.bool_)
    work = Work(
        load, load, no, no, np.full(199, 1e-3), load * EXPERT_BYTES / cpu, np.full(199, np.inf), EXPERT_BYTES / link
    )
    return int(load[Fiddler().plan(work).unit_N != CPU][0])


def claims() -> list[Claim]:
    """Hits; copies against the CPU."""
    absent = "" if shares() else "the public counts are not beside the project"
    new = "half of the nominal 307 GB/s is assumed for its CPU; 120 GB/s, as of code that is not made for it, would do"
    found = []
    for kept, paper in HITS.items():
        found += [
            Claim(f"hits, {kept} experts, popularity of other texts", "hit rates", paper, hits(kept, False),
                  "fraction", 0.05 / paper, because=absent),
            Claim(f"hits, {kept} experts, popularity of the same texts", "not at hand", None, hits(kept, True),
                  "fraction", because=absent),
        ]  # fmt: skip
    for machine, (link, cpu) in MACHINES.items():
        found += [
            Claim(f"a copy over one token on the CPU, {machine}", "transfer against compute", "2 to 5", cpu / link,
                  "ratio", 0.2, because=new if "Ada" in machine else ""),
            Claim(f"tokens from which on an expert is copied, {machine}", "not at hand", None,
                  float(copied_from(machine)), "tokens"),
        ]  # fmt: skip
    return found
