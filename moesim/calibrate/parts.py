"""Seconds of the parts of one serving iteration, before any calibration.

An iteration is priced as the measured engines run it: with attention data parallelism each rank keeps its own requests
and the experts see the tokens of all ranks; with expert parallelism but without it, every rank holds all tokens,
computes its own experts, and an all-reduce adds them up. (`moesim.program.forward` lowers expert parallelism with
all-to-alls instead, as DeepEP does.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from moesim.costs import compute, network
from moesim.hardware import Cluster
from moesim.mixers import Attention, LatentAttention, Mixer
from moesim.model import BYTES_PER_PARAM, Dense, Experts, ModelSpec

PARTS = ("gemm", "attention", "experts", "collective", "collective_start", "launch")
"""Names of the parts: matrix products outside the experts, attention over the cache, experts, bytes of collectives, the
time to start them, and the time to start kernels."""


@dataclass(frozen=True)
class Deployment:
    """One model instance and how it is cut: attention in dp x tp ranks, experts in ep x etp ranks.

    kv_dtype: storage format of the KV cache.
    """

    model: ModelSpec
    cluster: Cluster
    dp: int
    tp: int
    ep: int
    etp: int
    kv_dtype: str

    @property
    def num_ranks(self) -> int:
        """Devices of one instance."""
        return self.dp * self.tp

    @cached_property
    def spans_nodes(self) -> bool:
        """Whether its collectives leave the node."""
        return self.num_ranks > self.cluster.devices_per_node

    @property
    def sends_tokens(self) -> bool:
        """Whether tokens go to the ranks of their experts alone (DeepEP), as engines do between nodes."""
        return self.dp > 1 and self.ep > 1 and self.spans_nodes


@dataclass(frozen=True)
class Step:
    """The work of one iteration on each data-parallel rank.

    Attributes:
        tokens: new tokens of a rank: one, or one and the drafts, per request in decode; the prompt's in prefill.
        requests: requests of a rank.
        context: mean tokens that a request looks back on, its new ones included.
        is_prefill: whether the new tokens are a prompt's, attending causally to themselves.
    """

    tokens: float
    requests: float
    context: float
    is_prefill: bool = False


class Kernels(Protocol):
    """Seconds of single kernels on one device."""

    def gemm_s(self, m: float, n: float, k: float, dtype: str) -> float:
        """One matrix product: m rows, an n x k weight."""

    def attention_s(self, mixer: Mixer, step: Step, deployment: Deployment) -> float:
        """Attention of one layer over its cache, without its projections."""

    def experts_s(self, experts: Experts, tokens: float, deployment: Deployment) -> float:
        """Routed experts of one layer on the busiest rank; `tokens` of all ranks together."""

    def allreduce_s(self, num_bytes: float, size: int) -> tuple[float, float]:
        """Seconds for the bytes of an all-reduce among `size` ranks, and seconds to start it."""

    def exchange_s(self, experts: Experts, tokens: float, deployment: Deployment) -> tuple[float, float]:
        """Seconds for the bytes of a dispatch and a combine of a rank's tokens, and seconds to start them."""


def iteration_parts(
    deployment: Deployment, step: Step, kernels: Kernels, num_layers: int | None = None
) -> dict[str, float]:
    """Seconds of each of `PARTS` in one iteration.

    num_layers: the last layers only, as in a draft module, which has one; None for all.
    """
    model, tp = deployment.model, deployment.tp
    parts = dict.fromkeys(PARTS, 0.0)
    layers = model.layers if num_layers is None else model.layers[-num_layers:]
    seen: dict[object, dict[str, float]] = {}
    for layer in layers:
        if layer not in seen:
            seen[layer] = _layer_parts(deployment, layer.mixer, layer.ffn, step, kernels)
        for name, seconds in seen[layer].items():
            parts[name] += seconds
    head_rows = step.requests if step.is_prefill else step.tokens
    parts["gemm"] += kernels.gemm_s(head_rows, model.vocab_size / tp, model.hidden_size, model.dtypes.embedding)
    return parts


def _layer_parts(
    deployment: Deployment, mixer: Mixer | None, ffn: Dense | Experts | None, step: Step, kernels: Kernels
) -> dict[str, float]:
    model, tp, tokens = deployment.model, deployment.tp, step.tokens
    h, dtypes, parts = model.hidden_size, model.dtypes, dict.fromkeys(PARTS, 0.0)
    products: list[tuple[float, float, str]] = []
    collectives: list[tuple[float, int]] = []
    launches = 0.0  # as `moesim.program.forward` counts them
    if mixer is not None:
        products += [(n, k, dtypes.attention) for n, k in projections(mixer, h, tp)]
        parts["attention"] = kernels.attention_s(mixer, step, deployment)
        launches += 7.0 if isinstance(mixer, LatentAttention) else 4.0
        if tp > 1:
            collectives.append((tokens, tp))
    if isinstance(ffn, Dense):
        products += _feed_forward(h, ffn.width, ffn.gated, tp, dtypes.dense)
        launches += 3.0
        if tp > 1:
            collectives.append((tokens, tp))
    elif isinstance(ffn, Experts):
        products.append((ffn.num_experts, h, dtypes.activation))
        if width := ffn.shared_width + ffn.residual_width:
            launches += 3.0
            products += _feed_forward(h, width, ffn.gated, tp, dtypes.dense)
        parts["experts"] = kernels.experts_s(ffn, tokens * deployment.dp, deployment)
        launches += 4.0  # router and experts
        if deployment.sends_tokens:
            parts["collective"], parts["collective_start"] = kernels.exchange_s(ffn, tokens, deployment)
        elif deployment.num_ranks > 1:
            collectives.append((tokens * deployment.dp, deployment.num_ranks))
            if deployment.dp > 1:  # its two halves, before and after the experts, are two kernels
                collectives.append((0.0, deployment.num_ranks))
    parts["gemm"] = sum(kernels.gemm_s(tokens, n, k, dtype) for n, k, dtype in products)
    for rows, size in collectives:
        moving, starting = kernels.allreduce_s(rows * h * BYTES_PER_PARAM[dtypes.activation], size)
        parts["collective"] += moving
        parts["collective_start"] += starting
    # Rows of fp8 products are quantised first, by a kernel of their own.
    launches += sum(dtype.startswith("fp8") for _, _, dtype in products)
    parts["launch"] = launches * compute.launch_s(deployment.cluster.device, "value")
    return parts


def projections(mixer: Mixer, hidden_size: int, tp: int) -> list[tuple[float, float]]:
    """(n, k) of the projections of one layer on one rank; the low-rank down-projections are not cut by tp."""
    if isinstance(mixer, Attention):
        q, kv = mixer.num_heads * mixer.head_dim / tp, max(mixer.num_kv_heads / tp, 1.0) * mixer.head_dim
        return [(q + 2 * kv, hidden_size), (hidden_size, q)]
    if isinstance(mixer, LatentAttention):
        heads, latent = mixer.num_heads / tp, mixer.kv_lora_rank
        q_rank = mixer.q_lora_rank or 0
        up = [(heads * mixer.head_dim, q_rank or hidden_size)]
        absorbed = [(heads * mixer.qk_nope_head_dim, latent), (heads * mixer.v_head_dim, latent)]
        down = [(q_rank + latent + mixer.qk_rope_head_dim, hidden_size)]
        return [*down, *up, *absorbed, (hidden_size, heads * mixer.v_head_dim)]
    return [(mixer.num_params(hidden_size) / tp / hidden_size, hidden_size)]


def _feed_forward(h: int, width: int, gated: bool, tp: int, dtype: str) -> list[tuple[float, float, str]]:
    return [((2 if gated else 1) * width / tp, h, dtype), (h, width / tp, dtype)]


@dataclass(frozen=True)
class Roofline:
    """Kernels from datasheet peaks and the stated efficiencies of a device."""

    cluster: Cluster

    def gemm_s(self, m: float, n: float, k: float, dtype: str) -> float:
        """The slower of arithmetic and memory."""
        num_bytes = n * k * BYTES_PER_PARAM[dtype] + 2.0 * m * (n + k)
        return float(compute.gemm_s(np.array(2.0 * m * n * k), np.array(num_bytes), self.cluster.device, dtype))

    def attention_s(self, mixer: Mixer, step: Step, deployment: Deployment) -> float:
        """Reading the cache (decode) or the scores of causal attention (prefill)."""
        flops, num_bytes = attention_work(mixer, step, deployment)
        return float(compute.attention_core_s(np.array(flops), np.array(num_bytes), self.cluster.device))

    def experts_s(self, experts: Experts, tokens: float, deployment: Deployment) -> float:
        """Even choice of experts: each distinct one is read once, all rows are multiplied."""
        h, dtype = deployment.model.hidden_size, deployment.model.dtypes.experts
        params = experts.expert_params(h, max(experts.expert_widths)) / deployment.etp
        rows = tokens * experts.top_k / deployment.ep
        distinct = expected_distinct(experts.num_experts, experts.top_k, tokens) / deployment.ep
        num_bytes = distinct * params * BYTES_PER_PARAM[dtype] + 4.0 * h * rows
        device = self.cluster.device
        return float(
            compute.gemm_s(np.array(2.0 * params * rows), np.array(num_bytes), device, dtype, kind="grouped_gemm")
        )

    def allreduce_s(self, num_bytes: float, size: int) -> tuple[float, float]:
        """Reduce-scatter and all-gather; between nodes, each device carries its share of the buffer.

        Source: hierarchical all-reduce, as NCCL does it with one NIC to a device.
        """
        local = min(size, self.cluster.devices_per_node)
        half_s = float(network.half_all_reduce_s(np.array(num_bytes), local, self.cluster))
        if size > local:
            half_s += float(network.half_all_reduce_s(np.array(num_bytes / local), size, self.cluster))
        return 2 * half_s, self._start_s(size)

    def exchange_s(self, experts: Experts, tokens: float, deployment: Deployment) -> tuple[float, float]:
        """A token goes once to each other node that has one of its experts, in one byte, and comes back in two.

        Source: DeepEP's normal kernels (github.com/deepseek-ai/DeepEP), choices even and independent.
        """
        nodes = deployment.num_ranks / self.cluster.devices_per_node
        reached = expected_distinct(nodes, 1, experts.top_k) * (nodes - 1) / nodes
        rate = self.cluster.scale_out.bytes_per_s * compute.efficiency(self.cluster.device, "network", "value")
        num_bytes = 3.0 * tokens * reached * deployment.model.hidden_size
        return num_bytes / rate, 2 * self._start_s(deployment.num_ranks)

    def _start_s(self, size: int) -> float:
        """Latency among `size` ranks, and one launch."""
        return network.latency_s(size, self.cluster) + compute.launch_s(self.cluster.device, "value")


def expected_distinct(num_experts: float, top_k: int, tokens: float) -> float:
    """Experts that at least one of the tokens chose, choices even and independent.

    >>> expected_distinct(4, 1, 1)
    1.0
    >>> expected_distinct(4, 2, 2)
    3.0
    """
    return float(num_experts * (1.0 - (1.0 - top_k / num_experts) ** tokens))


def attention_work(mixer: Mixer, step: Step, deployment: Deployment) -> tuple[float, float]:
    """FLOP and bytes of the cache of one layer's attention on one rank."""
    tp, kv_bytes = deployment.tp, BYTES_PER_PARAM[deployment.kv_dtype]
    seen = step.context if mixer.window is None else min(step.context, mixer.window)
    pairs = step.tokens * seen / (2.0 if step.is_prefill and mixer.window is None else 1.0)
    cache_bytes = step.requests * seen * mixer.kv_values_per_token() * kv_bytes
    if isinstance(mixer, Attention):
        return 4.0 * mixer.num_heads * mixer.head_dim * pairs / tp, cache_bytes / min(tp, mixer.num_kv_heads)
    if isinstance(mixer, LatentAttention):
        absorbed = 2 * mixer.kv_lora_rank + mixer.qk_rope_head_dim
        width = mixer.head_dim + mixer.v_head_dim if step.is_prefill else absorbed
        return 2.0 * mixer.num_heads * width * pairs / tp, cache_bytes
    state_bytes = 2.0 * step.requests * mixer.state_values(deployment.model.hidden_size) * kv_bytes / tp
    return 0.0, state_bytes
