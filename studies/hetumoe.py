"""HetuMoE's hierarchical all-to-all (arXiv 2203.14685).

Question: where eight GPUs share one 100 Gb/s NIC, is it faster to collect a node's messages on one GPU first?

Setting: 4 and 8 nodes of `pcie-box-3090-x8`; which GPUs the paper had is not known here, and only their links count.
Every GPU has 16 MiB to send in equal shares; the paper's size is not at hand either, but as the constant below is
fitted for it, the ratios do not depend on it (nor does the verdict on PCIe 3.0 or 4.0).

Lever: `flat` against `leaders` (1DH): gather in the node, exchange between first GPUs, scatter.

Expected before the first run: on bytes alone leaders lose, since they pass PCIe twice more. They win where a message
has a price: flat sends 64 times as many through a NIC. One constant stands for that price, the size of a message that
reaches half of a link's rate; fitted to the gain on 4 x 8 GPUs, it gives about 2 on 8 x 8.

Cannot speak about: gates, layout kernels and training throughput, which are most of the paper's end-to-end gains. The
two gains are recalled, not read.
"""

from __future__ import annotations

from functools import cache

from moesim.files.hardware import load_cluster
from moesim.network.routes import Fabric
from moesim.network.sends import Sends, seconds
from moesim.policies.collective import AllToAll, Flat, Leaders, Ranks, TokenTraffic
from moesim.study import Claim, bisected

PER_NODE = 8
RANK_BYTES = 16 * 2.0**20
GAIN_4X8 = 1.66


@cache
def fabric(num_nodes: int) -> Fabric:
    """Nodes with one NIC each."""
    return Fabric(load_cluster(f"{num_nodes} x pcie-box-3090-x8"))


def exchange_s(algorithm: AllToAll, num_nodes: int, half_size_bytes: float) -> float:
    """One all-to-all in equal shares."""
    traffic = TokenTraffic.even(Ranks(num_nodes * PER_NODE, PER_NODE), RANK_BYTES)
    return sum(seconds(algorithm.dispatch(traffic), fabric(num_nodes), half_size_bytes=half_size_bytes))


def gain(num_nodes: int, half_size_bytes: float) -> float:
    """How many times as fast leaders are."""
    return exchange_s(Flat(), num_nodes, half_size_bytes) / exchange_s(Leaders(), num_nodes, half_size_bytes)


def fitted_half_size_bytes() -> float:
    """The size of a message at half of the rate that gives the paper's gain on 4 x 8 GPUs, by bisection."""
    return bisected(lambda size: gain(4, size) < GAIN_4X8, 0.0, RANK_BYTES, 60)[0]


def leaving(algorithm: AllToAll, num_nodes: int) -> Sends:
    """What the first node sends to others."""
    traffic = TokenTraffic.even(Ranks(num_nodes * PER_NODE, PER_NODE), RANK_BYTES)
    rounds = algorithm.dispatch(traffic)
    (sends,) = [s for s in rounds if (s.source_F // PER_NODE != s.target_F // PER_NODE).any()]
    keep = (sends.source_F < PER_NODE) & (sends.target_F >= PER_NODE)
    return Sends(sends.source_F[keep], sends.target_F[keep], sends.bytes_F[keep])


def flat_bytes_per_s(num_nodes: int, paper: float) -> float:
    """What flat must have got through a NIC, if leaders took what bytes say and the paper's gain is right."""
    return float(leaving(Flat(), num_nodes).bytes_F.sum()) / (paper * exchange_s(Leaders(), num_nodes, 0.0))


def gain_at_rate(bytes_per_s: float) -> float:
    """Leaders against flat on 8 x 8 GPUs, if flat gets so much through a NIC whatever its messages."""
    return float(leaving(Flat(), 8).bytes_F.sum()) / bytes_per_s / exchange_s(Leaders(), 8, 0.0)


def claims() -> list[Claim]:
    """Counts of messages, then gains."""
    flat, led = leaving(Flat(), 4), leaving(Leaders(), 4)
    model = "cost model, as FSMoE repeats it"
    half_size_bytes = fitted_half_size_bytes()
    rates = [flat_bytes_per_s(*given) for given in ((4, GAIN_4X8), (8, 2.0))]
    return [
        Claim("sends through a NIC, flat, 4 x 8 GPUs: G^2 (N - 1)", model, 192.0, float(len(flat.bytes_F)), "", 1e-9),
        Claim("sends through a NIC, leaders, 4 x 8 GPUs: N - 1", model, 3.0, float(len(led.bytes_F)), "", 1e-9),
        Claim(
            "a message between nodes is G^2 times as large", model, 64.0,
            float(led.bytes_F.mean() / flat.bytes_F.mean()), "ratio", 1e-9,
        ),
        Claim(
            "leaders against flat, 4 x 8 GPUs", "recalled", GAIN_4X8, gain(4, half_size_bytes), "ratio", 0.25,
            fitted=f"half of the rate at messages of {half_size_bytes / 1e6:.2f} MB",
        ),
        Claim(
            "leaders against flat, 8 x 8 GPUs", "recalled", 2.0, gain(8, half_size_bytes), "ratio", 0.25,
            because=f"both gains mean that flat got {rates[0] / 1e9:.1f} and {rates[1] / 1e9:.1f} GB/s of 12.5 through "
            "a NIC: nearly the same for messages of half the size, so a low share of the rate, not a price of each; "
            f"the first rate alone gives {gain_at_rate(rates[0]):.2f}",
        ),
        Claim(
            "the gain grows from 4 to 8 nodes", "recalled", "> 1",
            gain(8, half_size_bytes) / gain(4, half_size_bytes), "ratio",
        ),
        Claim(
            "leaders against flat, 4 x 8 GPUs, by bytes alone", "not in the paper", None, gain(4, 0.0), "ratio",
            because="the paper times messages with their price only",
        ),
        Claim(
            "faster than DeepSpeed-MoE, switch gate, batch 32: up to", "abstract", 8.1, None, "ratio", 0.25,
            because="it counts gates and layout kernels, which the network model has not",
        ),
    ]  # fmt: skip
