"""Throughput of a model whose weights are streamed from host memory to the GPU in every step, for large batches.

All times are of one step of the whole model: every weight crosses the link once, whatever the
batch; computation and the caches that are read grow with it. What overlaps does not add up.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Streams:
    """A model and a machine, as numbers.

    Attributes:
        weight_bytes: of all weights.
        kv_bytes: of the cache of one token, all layers; flops: of one token, all layers.
        link_bytes_per_s: host to device, as measured; host_bytes: memory for weights and caches.
        gpu_flops_per_s: as reached; cpu_kv_bytes_per_s: caches that attention on the CPU reads.
        host_bytes_per_s: what host memory has for link and CPU together; infinite if it never matters.
    """

    weight_bytes: float
    kv_bytes: float
    flops: float
    link_bytes_per_s: float
    gpu_flops_per_s: float
    cpu_kv_bytes_per_s: float = float("inf")
    host_bytes: float = float("inf")
    host_bytes_per_s: float = float("inf")

    @property
    def streaming_s(self) -> float:
        """Of the weights of one step."""
        return self.weight_bytes / self.link_bytes_per_s

    def host_sequences(self, tokens: float) -> float:
        """Sequences of so many tokens whose caches fit in host memory beside the weights."""
        return max(0.0, self.host_bytes - self.weight_bytes) / (tokens * self.kv_bytes)

    def busy_s(
        self, sequences: float, context: float, cpu_share: float = 0.0, kv_on_gpu: bool = False
    ) -> dict[str, float]:
        """Seconds of each resource in a step of one token for each sequence; it lasts as long as the longest.

        The link ("h2d") carries weights, and the caches that the GPU attends to unless it holds them; the CPU reads the
        caches of its share of attention; host memory feeds both.

        >>> Streams(100.0, 1.0, 10.0, 10.0, 100.0, 20.0).busy_s(4, 50.0, cpu_share=0.5)
        {'h2d': 20.0, 'compute': 0.4, 'cpu': 5.0, 'host memory': 0.0}
        """
        kv_bytes = sequences * context * self.kv_bytes
        moved = self.weight_bytes
        if not kv_on_gpu:
            moved += (1 - cpu_share) * kv_bytes
        read = moved + cpu_share * kv_bytes
        return {
            "h2d": moved / self.link_bytes_per_s,
            "compute": sequences * self.flops / self.gpu_flops_per_s,
            "cpu": cpu_share * kv_bytes / self.cpu_kv_bytes_per_s,
            "host memory": read / self.host_bytes_per_s,
        }

    def prefill_s(self, tokens: float) -> float:
        """Of so many prompt tokens at once: the weights cross while they compute."""
        return max(self.streaming_s, tokens * self.flops / self.gpu_flops_per_s)


def saturating_tokens(flops_per_s: float, link_bytes_per_s: float, num_experts: int, top_k: int) -> float:
    """Tokens in a step from which on computation, not streaming, takes longest: C / B x E / K.

    A 16-bit weight is 2 bytes and 2 FLOP for a token, of K experts in E.
    Source: MoE-Lens (arXiv 2504.09345), section 3.

    >>> saturating_tokens(150e12, 32e9, 8, 2)
    18750.0
    """
    return flops_per_s / link_bytes_per_s * num_experts / top_k


def tokens_through(prompt: float, answer: float) -> float:
    """PME: tokens computed in a step for each token of cache memory, in the steady state of requests of p and g tokens.

    2 (p + g) / ((2 p + g) g): a request is in memory for g steps with p + g / 2 tokens, and brings p + g.
    Source: MoE-Lens (arXiv 2504.09345), section 3.

    >>> tokens_through(100, 100)
    0.013333333333333334
    """
    return 2 * (prompt + answer) / ((2 * prompt + answer) * answer)


def generation_bound(streams: Streams, prompt: float, answer: float, kv_bytes: float, step_tokens: float) -> float:
    """Generated tokens a second at most: T = min(PME M, tokens that a step computes) / delta, of which g in p + g.

    Args:
        kv_bytes: host memory for caches; M tokens.
        step_tokens: tokens that saturate the GPU in one step (T_GPU = that over delta).

    Source: MoE-Lens (arXiv 2504.09345), section 3.
    """
    cached = kv_bytes / streams.kv_bytes
    total = min(tokens_through(prompt, answer) * cached, step_tokens) / streams.streaming_s
    return total * answer / (prompt + answer)
