"""SMILE's bi-level routing (arXiv 2212.05191).

Question: on 128 GPUs behind EFA, what is gained by sending a token to its node first, and to its GPU there after?

Setting: 16 nodes of `p4d-24xlarge` (8 A100, four NICs of 100 Gb/s). Every GPU has 64 MiB to send in equal shares,
top-1; the paper's size is not at hand, and does not matter, as the constant below is fitted for it.

Lever: `flat` among 128 GPUs, against `rails` (between GPUs of equal index, then inside nodes), one after the other.

Expected before the first run: both ways send the same bytes through the NICs, so bytes alone give no gain. The gain is
that of messages 8 times as large, an eighth as many. One constant stands for the price of a message, the size at which
it reaches half of a link's rate; fitted to flat over the exchange between nodes, it gives the exchange inside them.

Cannot speak about: routers, losses and throughput of training; why a message is so dear: 0.4 ms of a port is no start,
and stands for what the paper calls congestion. The times are recalled, not read.
"""

from __future__ import annotations

from functools import cache

from moesim.files.hardware import load_cluster
from moesim.network.routes import Fabric
from moesim.network.sends import seconds
from moesim.policies.collective import Flat, Rails, Ranks, TokenTraffic
from moesim.study import Claim, bisected

NUM_NODES, PER_NODE = 16, 8
RANK_BYTES = 64 * 2.0**20
FLAT_S, BETWEEN_S, INSIDE_S = 382e-3, 77e-3, 9e-3
"""The paper's all-to-alls of one layer."""


@cache
def fabric(num_nodes: int) -> Fabric:
    """Nodes on EFA."""
    return Fabric(load_cluster(f"{num_nodes} x p4d-24xlarge"))


def exchange_s(num_nodes: int, half_size_bytes: float) -> tuple[float, float, float]:
    """Flat; bi-level between nodes; and inside them."""
    traffic = TokenTraffic.even(Ranks(num_nodes * PER_NODE, PER_NODE), RANK_BYTES)
    rounds = [*Flat().dispatch(traffic), *Rails(is_pipelined=False).dispatch(traffic)]
    flat, between, inside = seconds(rounds, fabric(num_nodes), half_size_bytes=half_size_bytes)
    return flat, between, inside


def fitted_half_size_bytes() -> float:
    """The size of a message at half of the rate that gives the paper's ratio of flat to between nodes, by bisection."""

    def is_low(size: float) -> bool:
        flat, between, _ = exchange_s(NUM_NODES, size)
        return flat / between < FLAT_S / BETWEEN_S

    return bisected(is_low, 0.0, RANK_BYTES, 60)[0]


def messages() -> tuple[float, float]:
    """Of one GPU: flat, and bi-level; as the paper counts, one to itself in each round."""
    traffic = TokenTraffic.even(Ranks(NUM_NODES * PER_NODE, PER_NODE), RANK_BYTES)
    flat, bi_level = (
        sum((sends.source_F == 0).sum() + 1 for sends in way.dispatch(traffic)) for way in (Flat(), Rails())
    )
    return float(flat), float(bi_level)


def claims() -> list[Claim]:
    """Messages, then ratios of times."""
    half_size_bytes = fitted_half_size_bytes()
    flat, between, inside = exchange_s(NUM_NODES, half_size_bytes)
    few = exchange_s(2, half_size_bytes)
    counted, cell = messages(), "recalled: times of one layer"
    by_bytes = exchange_s(NUM_NODES, 0.0)
    reached = [RANK_BYTES * (1 - 1 / PER_NODE) * BETWEEN_S / took / INSIDE_S / 1e9 for took in (between, by_bytes[1])]
    return [
        Claim("messages of a GPU, flat: n m", "complexity of sends", 128.0, counted[0], "", 1e-9),
        Claim("messages of a GPU, bi-level: n + m", "complexity of sends", 24.0, counted[1], "", 1e-9),
        Claim(
            "flat over the exchange between nodes", cell, FLAT_S / BETWEEN_S, flat / between, "ratio", 0.25,
            fitted=f"half of the rate at messages of {half_size_bytes / 1e6:.1f} MB",
        ),
        Claim(
            "between nodes over inside them", cell, BETWEEN_S / INSIDE_S, between / inside, "ratio", 0.25,
            because=f"what takes 77 ms between nodes, by our price or by bytes alone, moves at {reached[0]:.0f} or "
            f"{reached[1]:.0f} GB/s of NVLink's 300 in the paper's 9 ms: not bytes, but what surrounds them",
        ),
        Claim("flat loses more than bi-level from 2 to 16 nodes", "abstract: poor scalability", "> 1",
              flat / few[0] / ((between + inside) / (few[1] + few[2])), "ratio"),
        Claim("flat over both exchanges of bi-level, by bytes alone", "not in the paper", None,
              by_bytes[0] / (by_bytes[1] + by_bytes[2]), "ratio",
              because="the paper times messages with their price only"),
        Claim("throughput over Switch", "abstract", 2.5, None, "ratio", 0.25,
              because="steps of training are not lowered yet"),
    ]  # fmt: skip
