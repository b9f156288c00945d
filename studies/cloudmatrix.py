"""Dispatch and combine of CloudMatrix-Infer (arXiv 2506.12708), and DeepEP's beside them.

Question: what do fused dispatch and combine take on a flat bus of 8 to 256 dies, against DeepEP on H800, and do the
paper's numbers fit together?

Setting: `cloudmatrix-384`, a rank is a die; H800 nodes for DeepEP. Each rank has 128 tokens of DeepSeek-R1, which go to
8 experts each, evenly; a message is 7.5 KiB in dispatch (INT8) and 14 KiB in combine (BF16), DeepEP's 7,168 bytes with
a scale of four for each 128, and 14 KiB. The number of tokens is not at hand, and is checked below.

Lever: number of ranks; direct writes over one bus (`low_latency`) against RDMA between all ranks of DeepEP, whose
46 GB/s inside a node, just below the NIC's 50, show that NVLink was not used: it is switched off here.

Expected before the first run: on the bus, the time to start dominates; one constant, fitted to dispatch among 8 dies,
gives the three other times. On H800 the NIC's rate dominates; the share of it that `low_latency` comes with, fitted to
later times of DeepEP on its own page, gives all four times, and nothing is fitted here.

Cannot speak about: decode steps, micro-batches and speculation, which `moesim validate wide-ep` predicts; caches; the
time that an operator computes for.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from moesim.files.hardware import load_cluster
from moesim.network.routes import Fabric
from moesim.network.sends import seconds
from moesim.policies.collective import LowLatency, Ranks, TokenTraffic
from moesim.study import Claim

MESSAGES = 128 * 8
ROW_BYTES = {"dispatch": 7.5 * 1024, "combine": 14.0 * 1024}
DEEPEP_ROW_BYTES = {"dispatch": 7168 + 4 * 7168 / 128, "combine": 2.0 * 7168}
PAPER_S = {("dispatch", 8): 116e-6, ("dispatch", 256): 152e-6, ("combine", 8): 118e-6, ("combine", 256): 149e-6}
DEEPEP_S = {("dispatch", 8): 163e-6, ("dispatch", 256): 194e-6, ("combine", 8): 318e-6, ("combine", 256): 360e-6}
PAPER_BYTES_PER_S = {"dispatch": (71e9, 54e9), "combine": (131e9, 103e9)}
DEEPEP_BYTES_PER_S = {"dispatch": (46e9, 39e9), "combine": (46e9, 40e9)}
OPERATORS = "table of operators"


@cache
def bus() -> Fabric:
    """The whole supernode."""
    return Fabric(load_cluster("cloudmatrix-384"))


@cache
def rdma(num_ranks: int) -> Fabric:
    """H800 nodes whose GPUs reach each other over their NICs alone."""
    cluster = load_cluster(f"{max(2, num_ranks // 8)} x hgx-h800")
    off = [vertex for vertex in cluster.topology if "nvswitch" in vertex or "pcie" in vertex]
    return Fabric(cluster, dict.fromkeys(off, 0.0))


def exchange_s(fabric: Fabric, num_ranks: int, rank_bytes: float, start_s: float = 0.0) -> float:
    """One dispatch or combine in equal shares."""
    ranks = Ranks(num_ranks, fabric.cluster.devices_per_node)
    schedule = LowLatency().dispatch(TokenTraffic.even(ranks, rank_bytes))
    return sum(seconds(schedule, fabric, start_s))


def on_bus_s(op: str, num_ranks: int, start_s: float) -> float:
    """CloudMatrix's operator."""
    return exchange_s(bus(), num_ranks, MESSAGES * ROW_BYTES[op], start_s)


def on_rdma_s(op: str, num_ranks: int) -> float:
    """DeepEP's operator: what is sent between nodes reaches a share of the NIC's rate."""
    share = LowLatency.reached[1].value if LowLatency.reached else 1.0
    return exchange_s(rdma(num_ranks), num_ranks, MESSAGES * DEEPEP_ROW_BYTES[op] / share)


def chance_s(op: str, num_ranks: int) -> float:
    """What routing by chance, 8 of 256 experts for each token, adds to equal shares: the fullest rank decides."""
    rng = np.random.default_rng(0)
    expert_BK = np.argsort(rng.random((128 * num_ranks, 256)), axis=1)[:, :8]
    source_B, ranks = np.repeat(np.arange(num_ranks), 128), Ranks(num_ranks, bus().cluster.devices_per_node)
    traffic = TokenTraffic.of(ranks, source_B, expert_BK * num_ranks // 256, ROW_BYTES[op])
    return sum(seconds(LowLatency().dispatch(traffic), bus())) - on_bus_s(op, num_ranks, 0.0)


def bytes_claims() -> list[Claim]:
    """What a rank sends: the paper's times and rates against tokens, experts and rows."""
    found = []
    for who, times, rates, rows in (
        ("CloudMatrix", PAPER_S, PAPER_BYTES_PER_S, ROW_BYTES),
        ("DeepEP", DEEPEP_S, DEEPEP_BYTES_PER_S, DEEPEP_ROW_BYTES),
    ):
        for op, pair in rates.items():
            paper = sum(times[op, ep] * rate for ep, rate in zip((8, 256), pair, strict=True)) / 2
            says = f"{who} {op}: what a rank sends, from time and rate"
            found.append(Claim(says, OPERATORS, paper, MESSAGES * rows[op], "bytes", 0.10))
    return found


def bus_claims() -> list[Claim]:
    """Times on the bus, from one constant."""
    start_s = PAPER_S["dispatch", 8] - on_bus_s("dispatch", 8, 0.0)
    ours_s = {(op, ep): on_bus_s(op, ep, start_s) for op in ROW_BYTES for ep in (8, 16, 32, 64, 128, 256)}
    peer_s = {op: (PAPER_S[op, 256] - PAPER_S[op, 8] - ours_s[op, 256] + ours_s[op, 8]) / (256 - 8) for op in ROW_BYTES}
    slower = {
        op: f"bytes hardly grow with ranks, and chance in routing adds {1e6 * chance_s(op, 256):.0f} us; the paper's "
        f"time grows by {1e9 * peer_s[op]:.0f} ns for each peer, which has no place here"
        for op in ROW_BYTES
    }
    sooner = (
        f"combine starts {1e6 * (ours_s['combine', 8] - PAPER_S['combine', 8]):.0f} us sooner than dispatch, which "
        "quantises its rows to INT8 first; one start for both is too few"
    )
    because = {("dispatch", 256): slower["dispatch"], ("combine", 8): sooner}
    found = []
    for (op, ep), ours in ours_s.items():
        fitted = f"a start of {1e6 * start_s:.0f} us" if (op, ep) == ("dispatch", 8) else ""
        found.append(
            Claim(
                f"CloudMatrix {op}, EP{ep}", OPERATORS, PAPER_S.get((op, ep)), ours, "s", 0.15, fitted=fitted,
                because=because.get((op, ep), ""),
            )
        )  # fmt: skip
    grown, ours = PAPER_S["combine", 256] / PAPER_S["combine", 8], ours_s["combine", 256] / ours_s["combine", 8]
    too_late = f"{slower['combine']}; that EP256 itself comes out right is two errors that cancel"
    return [
        *found,
        Claim("CloudMatrix combine, EP256 over EP8", OPERATORS, grown, ours, "ratio", 0.1, because=too_late),
    ]


def deepep_claims() -> list[Claim]:
    """Times on H800, nothing fitted here."""
    ours_s = {(op, ep): on_rdma_s(op, ep) for op, ep in DEEPEP_S}
    times = [
        Claim(f"DeepEP {op}, EP{ep}", OPERATORS, DEEPEP_S[op, ep], ours, "s", 0.1) for (op, ep), ours in ours_s.items()
    ]
    grown = [
        Claim(
            f"DeepEP {op}, EP256 over EP8", OPERATORS, DEEPEP_S[op, 256] / DEEPEP_S[op, 8],
            ours_s[op, 256] / ours_s[op, 8], "ratio", 0.05,
        )
        for op in ROW_BYTES
    ]  # fmt: skip
    return times + grown


def identity_claims() -> list[Claim]:
    """The paper's own numbers against each other."""
    return [
        Claim("decode: batch 96 over 49.4 ms", "decode table", 1943.0, 96 / 49.4e-3, "tokens_per_s", 0.001),
        Claim("decode: batch 8 over 538 tokens/s", "decode table", 14.9e-3, 8 / 538, "s", 0.01),
        Claim(
            "61 layers of 1.26 ms fit into the step of 1.7 tokens: share left for the rest", "decode ablation",
            "0 to 0.15", 1 - 61 * 1.26e-3 / (1.7 * 49.4e-3), "fraction",
        ),
        Claim(
            "static buffers of a die", "section on fused operators", 645 * 2.0**20,
            2 * 48 * 320 * sum(ROW_BYTES.values()), "bytes", 0.01,
            fitted="that they hold two batches of 48 tokens from each of 320 ranks, in both formats, was read off it",
        ),
    ]  # fmt: skip


def claims() -> list[Claim]:
    """Bytes, the bus, DeepEP, identities."""
    return [*bytes_claims(), *bus_claims(), *deepep_claims(), *identity_claims()]
