"""Towards MoE Deployment (arXiv 2303.06182): dynamic gating against static capacity.

Question: what does it cost to pad every expert to a fixed capacity, and to dispatch by a one-hot product, when a token
chooses 2 of 128 or 512 experts?

Setting: nodes of `dgx-v100`. LM: 24 layers of width 1024, 512 experts of width 4096 in every second one, capacity 0.05
of a device's tokens. MT encoder: 24 layers of width 2048, 128 experts of width 8192 in every fourth, capacity 1.
Widths follow from 52 and 54.5 billion parameters. Tokens on a GPU are not at hand: they are what gives the published
latency of the dense model of the same FLOP.

Lever: static (every expert takes C S rows of each GPU; masks of S x E C S entries multiply the tokens on the way in
and out) or dynamic (2 S rows, gathered by index).

Expected before the first run: waste factors agree exactly. Static latency and memory come within a quarter, since they
are large products and arrays. Dynamic gating gains more here than published, because what is left of its time is host
work and many small kernels, of which the model has only the starts.

Cannot speak about: the decoder, whose 32 ms for a step of a dense model are not set by the device; Tutel; caches of
experts; balancing placement. Published gains are "up to", over batch sizes that are not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.costs import network
from moesim.costs.operators import Operators
from moesim.files.hardware import load_cluster
from moesim.hardware import Cluster
from moesim.model import Dense, Experts
from moesim.study import Claim, bisected

K = 2


@dataclass(frozen=True)
class Gated:
    """A stack of layers, some of them with experts; `capacity` of an expert is a share of a GPU's tokens."""

    hidden: int
    width: int
    layers: int
    moe_layers: int
    experts: int
    capacity: float

    @property
    def waste(self) -> float:
        """Rows that static gating computes for each one that is needed."""
        return self.experts * self.capacity / K


LM = Gated(1024, 4096, 24, 12, 512, 0.05)
ENCODER = Gated(2048, 8192, 24, 6, 128, 1.0)


def product_s(cluster: Cluster, rows: float, n: int, k: int) -> float:
    """Rows times a matrix, in 16 bits."""
    return float(Operators(cluster.device).matmuls([(n, k)], np.array([rows]), "fp16", 2.0).seconds[0])


def dense_s(model: Gated, cluster: Cluster, tokens: float) -> float:
    """The dense model of the same FLOP: networks of K times the width where the other has experts."""
    h = model.hidden
    wide = model.layers + (K - 1) * model.moe_layers
    projections = product_s(cluster, tokens, 3 * h, h) + product_s(cluster, tokens, h, h)
    network_s = product_s(cluster, tokens, model.width, h) + product_s(cluster, tokens, h, model.width)
    return model.layers * projections + wide * network_s


def fitted_tokens(model: Gated, latency_s: float) -> float:
    """Tokens on a GPU at which the dense model takes that long, by bisection."""
    cluster = load_cluster("dgx-v100")
    return bisected(lambda tokens: dense_s(model, cluster, tokens) < latency_s, 1.0, 1e6, 60)[0]


def exchange_s(model: Gated, cluster: Cluster, rows: float) -> float:
    """All-to-all of `rows` rows of every GPU, spread evenly."""
    ranks = cluster.num_ranks
    near, far = ((n * rows / ranks) for n in (cluster.devices_per_node - 1, ranks - cluster.devices_per_node))
    traffic_CLR = np.array([near, far, near, far]).round().astype(np.int32).reshape(4, 1, 1)
    operators = Operators(cluster.device)
    moved = operators.collective(network.all_to_all_s(traffic_CLR, 2.0 * model.hidden, cluster))
    return float((operators.collective_start(ranks, cluster) + moved).seconds.max())


def static_layer_s(model: Gated, cluster: Cluster, tokens: float) -> float:
    """A MoE layer whose experts are padded to capacity: two one-hot products, two exchanges, and batched experts."""
    rows = model.experts * model.capacity * tokens
    masks = product_s(cluster, rows, model.hidden, round(tokens))
    masks += product_s(cluster, tokens, model.hidden, round(rows))
    local = model.experts / cluster.num_ranks
    each = rows / local  # rows of all GPUs at one expert
    experts = product_s(cluster, each, model.width, model.hidden) + product_s(cluster, each, model.hidden, model.width)
    return masks + local * experts + 2 * exchange_s(model, cluster, rows)


def dynamic_layer_s(model: Gated, cluster: Cluster, tokens: float) -> float:
    """The same with the rows that tokens chose, evenly: two exchanges (one of sizes besides) and grouped experts."""
    ranks, operators = cluster.num_ranks, Operators(cluster.device)
    local = model.experts // ranks
    load_LRS = np.full((1, 1, local), round(K * tokens / local), np.int32)
    ffn = Experts((model.width,) * model.experts, K, gated=False)
    params_LRS = np.full(load_LRS.shape, float(Dense(model.width, gated=False).num_params(model.hidden)))
    experts = operators.experts(load_LRS, params_LRS, ffn, model.hidden, "fp16").seconds.sum()
    starts = operators.launches(2.0 * local + 8).seconds  # each expert's two products; sort, count, gather and scatter
    sizes = operators.collective_start(ranks, cluster).seconds
    return float(experts + starts + sizes + 2 * exchange_s(model, cluster, K * tokens))


def latency_s(model: Gated, cluster: Cluster, tokens: float, layer_s: float) -> float:
    """The whole stack: the dense one, less the networks that the experts stand for."""
    h = model.hidden
    replaced = product_s(cluster, tokens, model.width, h) + product_s(cluster, tokens, h, model.width)
    return dense_s(model, cluster, tokens) + model.moe_layers * (layer_s - K * replaced)


def both_s(model: Gated, machine: str, tokens: float) -> tuple[float, float]:
    """Latency with static and with dynamic gating."""
    cluster = load_cluster(machine)
    layers = static_layer_s(model, cluster, tokens), dynamic_layer_s(model, cluster, tokens)
    return latency_s(model, cluster, tokens, layers[0]), latency_s(model, cluster, tokens, layers[1])


def saved_gb(model: Gated, tokens: float) -> float:
    """Activations of one layer that static gating holds beyond the tokens' own.

    A mask of one byte and weights of two for each entry, and padded rows on the way in and out.
    """
    rows = model.experts * model.capacity * tokens
    return float(3 * tokens * rows + 2 * 2 * (rows - K * tokens) * model.hidden) / 1e9


def claims() -> list[Claim]:
    """Waste, latency, gains on one node and four, memory."""
    lm, encoder = fitted_tokens(LM, 0.0742), fitted_tokens(ENCODER, 0.101)
    one = both_s(LM, "dgx-v100", lm), both_s(ENCODER, "dgx-v100", encoder)
    four = both_s(LM, "4 x dgx-v100", lm), both_s(ENCODER, "4 x dgx-v100", encoder)
    host = "published, dynamic gating takes 0.18 (LM) and 0.39 s (encoder); 0.11 and 0.13 s here, nearly all of it the "
    host += "dense part: the rest of theirs is in neither bytes nor FLOP; host work is likely, and not modelled"
    attention = "tokens are told from the dense latency by products alone, and masks grow with their square: with the "
    attention += "time of attention there would be fewer, and with 6650 of them this is 1.09 s"
    gains, far_gains = ([static / dynamic for static, dynamic in pair] for pair in (one, four))
    return [
        Claim("LM: waste factor E C / k", "section on static gating", 12.8, LM.waste, "ratio", 1e-9),
        Claim("MT: waste factor E C / k", "section on static gating", 64.0, ENCODER.waste, "ratio", 1e-9),
        Claim("LM: latency of the dense model", "latency against dense", 0.0742,
              dense_s(LM, load_cluster("dgx-v100"), lm), "s", 0.01, fitted=f"{lm:.0f} tokens on a GPU"),
        Claim("MT encoder: latency of the dense model", "latency against dense", 0.101,
              dense_s(ENCODER, load_cluster("dgx-v100"), encoder), "s", 0.01, fitted=f"{encoder:.0f} tokens on a GPU"),
        Claim("LM: latency, static gating", "latency against dense", 1.09, one[0][0], "s", 0.25,
              because=attention),
        Claim("MT encoder: latency, static gating", "latency against dense", 2.26, one[1][0], "s", 0.25),
        Claim("LM: dynamic over static, one node, up to", "throughput", 6.21, gains[0], "ratio", 0.25, because=host),
        Claim("MT encoder: dynamic over static, one node, up to", "throughput", 5.75, gains[1], "ratio", 0.25,
              because=host),
        Claim("LM: dynamic over static, several nodes, up to", "throughput", 11.55, far_gains[0], "ratio", 0.25),
        Claim("MT encoder: dynamic over static, several nodes, up to", "throughput", 10.98, far_gains[1], "ratio",
              0.25, because=host),
        Claim("LM: the gain grows from one node to four", "throughput", "> 1", far_gains[0] / gains[0], "ratio"),
        Claim("MT encoder: the gain grows from one node to four", "throughput", "> 1", far_gains[1] / gains[1],
              "ratio"),
        Claim("MT decoder: dynamic over static, one node, up to", "throughput", 2.58, None, "ratio", 0.25,
              because="its 32 ms for a dense step are host work, which is not modelled"),
        Claim("LM, batch 8: activation memory saved, GB", "memory", 6.29 - 1.28, saved_gb(LM, lm), "", 0.25),
        Claim("MT, batch 8: activation memory saved, GB", "memory", 1.89 - 1.05,
              saved_gb(ENCODER, encoder * 8 / 48), "", 0.25),
    ]  # fmt: skip
