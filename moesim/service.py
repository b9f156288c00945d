"""A service: instances of a model on a machine, the traffic that they get, and what is promised to its users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import gcd
from sys import maxsize
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from moesim.costs import memory
from moesim.costs.calibration import Calibration
from moesim.costs.measured import MeasuredTables
from moesim.fleet import Fleet, Slo
from moesim.hardware import Cluster
from moesim.layout import AttentionGrid, ExpertGrid, Layout
from moesim.model import ModelSpec
from moesim.requests import Requests
from moesim.routing.trace import RoutingTrace
from moesim.scenario import source_warnings, trace_mistakes

_NAMES = {
    "all2all_backend": ("allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency", "none"),
    "scheduler": ("vllm", "sglang"),
    "scheduling_policy": ("fcfs", "priority"),
    "preemption_mode": ("recompute", "swap"),
    "init_expert_location": ("trivial", "statistics"),
    "routing": ("replayed", "memoised"),
}
_LEAST = {
    "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, "num_redundant_experts": 0,
    "eplb_window_size": 1, "eplb_step_interval": 1, "max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 2,
    "long_prefill_token_threshold": 0, "block_size": 1, "num_gpu_blocks_override": 1, "swap_space_gib": 0,
    "num_speculative_tokens": 0,
}  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    """How one instance serves; names are vLLM's where a thing is vLLM's.

    Attributes:
        tensor_parallel_size, pipeline_parallel_size, data_parallel_size: of one instance.
        enable_expert_parallel: experts over all its ranks, rather than cut in slices.
        all2all_backend: "allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency", or "none", which
            adds up the results of all ranks by an all-reduce (as tensor-parallel groups do).
        num_redundant_experts, enable_eplb, eplb_window_size, eplb_step_interval: copies of busy experts, re-placed
            every so many iterations by the load of a window of iterations.
        init_expert_location: where experts lie at first, named as SGLang's: "trivial", in order; "statistics", balanced
            by EPLB for the load of the whole trace (so the same traffic is known beforehand).
        max_num_seqs, max_num_batched_tokens: running requests, and tokens of an iteration, of a data-parallel rank.
        max_model_len: longest prompt and answer together; None takes what the KV cache holds.
        enable_chunked_prefill, long_prefill_token_threshold: whether a prompt may be cut, and (above 0) the most of it
            that goes into one iteration.
        scheduler: "vllm" mixes prompts and decoding in an iteration, "sglang" puts prompts into iterations of their own
            and first.
        scheduling_policy: "fcfs" or "priority".
        preemption_mode: "recompute" or "swap", when the cache is full.
        block_size: tokens of a KV block.
        gpu_memory_utilization: share of a device's memory that weights, activations and cache may take.
        num_gpu_blocks_override: KV blocks of a data-parallel rank, instead of what fits.
        enable_prefix_caching: keep the blocks of prompts for those that begin alike.
        swap_space_gib: host memory of a data-parallel rank, in 2^30 bytes, for blocks that leave the device; holds
            evicted prefix blocks and swapped requests.
        num_speculative_tokens, acceptance_length: drafts of an iteration, and tokens that it brings in the mean.
        routing: "replayed", every token by its row of the trace; "memoised", by batch sizes that were counted before.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    all2all_backend: str = "allgather_reducescatter"
    num_redundant_experts: int = 0
    enable_eplb: bool = False
    eplb_window_size: int = 1000
    eplb_step_interval: int = 3000
    init_expert_location: str = "trivial"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int | None = None
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    scheduler: str = "vllm"
    scheduling_policy: str = "fcfs"
    preemption_mode: str = "recompute"
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    swap_space_gib: float = 0.0
    num_speculative_tokens: int = 0
    acceptance_length: float = 1.0
    routing: str = "replayed"

    @property
    def num_ranks(self) -> int:
        """Devices of one instance."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    @property
    def layout(self) -> Layout:
        """The grids of one instance: experts over all ranks of a stage, or whole in each tensor-parallel group."""
        dp, tp = self.data_parallel_size, self.tensor_parallel_size
        is_spread = self.enable_expert_parallel and dp * tp > 1
        experts = ExpertGrid(ep=dp * tp) if is_spread else ExpertGrid(edp=dp, etp=tp)
        return Layout(AttentionGrid(dp, tp), experts, self.num_redundant_experts, pp=self.pipeline_parallel_size)

    def mistakes(self, model: ModelSpec, cluster: Cluster) -> list[str]:
        """What keeps an instance from being one, or from running the model on nodes of the machine."""
        found = [
            f"{key}: must be at least {least}, given {value}"
            for key, least in _LEAST.items()
            if (value := getattr(self, key)) is not None and not value >= least
        ]
        found += [
            f"{key}: unknown {getattr(self, key)!r}; one of {', '.join(known)} would do"
            for key, known in _NAMES.items()
            if getattr(self, key) not in known
        ]
        if not 0 < self.gpu_memory_utilization <= 1:
            found.append(f"gpu_memory_utilization: must lie in 0..1, above 0, given {self.gpu_memory_utilization}")
        if not 1 <= self.acceptance_length <= self.num_speculative_tokens + 1:
            found.append(
                f"acceptance_length: must lie in 1..{self.num_speculative_tokens + 1}, as num_speculative_tokens = "
                f"{self.num_speculative_tokens} allows, given {self.acceptance_length}"
            )
        return found or self._fit_mistakes(model, cluster)

    def _fit_mistakes(self, model: ModelSpec, cluster: Cluster) -> list[str]:
        """Of numbers that are sound each for itself: with each other, the model, and the machine."""
        found, dp, ranks, per_node = [], self.data_parallel_size, self.num_ranks, cluster.devices_per_node
        if ranks > cluster.num_ranks:
            found.append(
                f"data_parallel_size: one instance needs {ranks} devices, the machine has {cluster.num_ranks}; use "
                "fewer ranks"
            )
        elif cluster.num_nodes > 1 and ranks % per_node and per_node % ranks:
            found.append(
                f"data_parallel_size: the {ranks} ranks of an instance must be whole nodes of {per_node}, or divide one"
            )
        if dp > 1 and model.moe_layers and not self.enable_expert_parallel:
            found.append(
                f"enable_expert_parallel: must be true with data_parallel_size = {dp}; without it vLLM cuts each "
                f"expert over all {dp * self.tensor_parallel_size} ranks, which is not modelled"
            )
            return found
        if self.all2all_backend == "none" and dp > 1 and model.moe_layers:
            found.append(
                f'all2all_backend: "none" adds up results inside one tensor-parallel group, given data_parallel_size = '
                f'{dp}; "allgather_reducescatter" would do'
            )
        if (self.enable_eplb or self.num_redundant_experts) and self.layout.experts.ep == 1:
            found.append("enable_eplb: copies of experts need experts on several ranks; set enable_expert_parallel")
        if not self.enable_chunked_prefill and self.long_prefill_token_threshold:
            found.append("long_prefill_token_threshold: cuts prompts, which enable_chunked_prefill = false forbids")
        if self.scheduler == "sglang" and self.long_prefill_token_threshold:
            found.append("long_prefill_token_threshold: SGLang has none; max_num_batched_tokens cuts its prompts")
        if self.preemption_mode == "swap" and not self.swap_space_gib:
            found.append("preemption_mode: swapping needs swap_space_gib above 0, such as 4")
        in_layout = self.layout.mistakes(model, ranks)
        return found + [mistake.partition(": ")[2] for mistake in in_layout]


@dataclass(frozen=True, eq=False)
class Service:
    """Everything that a serving run needs.

    engine, decode_engine: of all instances (of those that prefill, where there are two kinds), and of those that
        decode.
    """

    name: str
    model: ModelSpec
    cluster: Cluster
    trace: RoutingTrace
    requests: Requests
    engine: EngineConfig = field(default_factory=EngineConfig)
    decode_engine: EngineConfig | None = None
    fleet: Fleet = field(default_factory=Fleet)
    slo: Slo = field(default_factory=Slo)
    tables: MeasuredTables = field(default_factory=MeasuredTables)
    calibration: Calibration | None = None
    seed: int = 0
    plain: Mapping[str, Any] = field(default_factory=dict)

    def stream(self, consumer: str) -> np.random.Generator:
        """The consumer's own stream of random numbers, which no other consumer moves."""
        return np.random.default_rng([self.seed, crc32(consumer.encode())])

    def warnings(self) -> list[str]:
        """What the reader of a result should know about where its routing, tables and traffic come from."""
        found = source_warnings(self.trace, self.tables, self.calibration, self.cluster.device.name)
        return found + list(self.requests.notes)

    def mistakes(self) -> list[str]:
        """Every rule that the parts break together, one sentence each; an empty list for a sound service."""
        engines = {"engine": self.engine} | ({"decode_engine": self.decode_engine} if self.decode_engine else {})
        found = trace_mistakes(self.trace, self.model) + self.slo.mistakes()
        for name, engine in engines.items():
            found += [f"{name}.{text}" for text in engine.mistakes(self.model, self.cluster)]
        if any(layer.cross for layer in self.model.layers):
            found.append(f"model: {self.model.name!r} is an encoder-decoder, which is not served; use a decoder")
        if self.calibration and self.calibration.needs_tables != bool(self.tables.tables):
            wanted = "give those tables as the profile" if self.calibration.needs_tables else "leave the profile out"
            found.append(f"calibration: fitted with kernels of {self.calibration.kernels!r}; {wanted}")
        if not found:
            decode_ranks = self.decode_engine.num_ranks if self.decode_engine else None
            found = self.fleet.mistakes(self.cluster.num_ranks, self.engine.num_ranks, decode_ranks)
            staged = [name for name, engine in engines.items() if engine.pipeline_parallel_size > 1]
            if staged and any(fault.kind == "slow" for fault in self.fleet.faults):
                found.append(
                    "fleet.faults: a slow rank of one stage is not modelled, given "
                    f"{staged[0]}.pipeline_parallel_size = {engines[staged[0]].pipeline_parallel_size}; use 1, or "
                    'kind = "down"'
                )
        return found or [text for name, engine in engines.items() for text in self._cache_mistakes(name, engine)]

    def _cache_mistakes(self, name: str, engine: EngineConfig) -> list[str]:
        """Whether the weights leave room for a cache, whose blocks prefixes fill, and some request fits into it."""
        requests, size = self.requests, engine.block_size
        if engine.enable_prefix_caching and requests.block_tokens % size:
            return [
                f"{name}.block_size: must divide requests.block_tokens = {requests.block_tokens}, given {size}; "
                f"{gcd(size, requests.block_tokens)} would do, or enable_prefix_caching = false"
            ]
        tokens = kv_tokens(self, engine)
        if not tokens:
            gib, device = 2**30, self.cluster.device
            used = max(_fixed_bytes(self.model, engine), key=sum)
            return [
                f"{name}: no room for a KV cache on one {device.name}: {engine.gpu_memory_utilization} of "
                f"{device.memory.capacity_bytes / gib:.1f} GiB, of which weights and activations take "
                f"{used[0] / gib:.1f} and windows and states of max_num_seqs requests {used[1] / gib:.1f} GiB; use "
                "more ranks, fewer max_num_seqs or max_num_batched_tokens, or a smaller dtype"
            ]
        limit = engine.max_model_len
        if limit is not None and limit > tokens:
            return [f"{name}.max_model_len: must be at most the {tokens} tokens of the KV cache, given {limit}"]
        longest = min(int((requests.prompt_Q + requests.output_Q).max()), limit or tokens, tokens)
        if not engine.enable_chunked_prefill and engine.max_num_batched_tokens < longest:
            return [
                f"{name}.max_num_batched_tokens: must hold the {longest} tokens of the longest prompt and answer where "
                f"enable_chunked_prefill = false, given {engine.max_num_batched_tokens}"
            ]
        prefills = self.fleet.is_disaggregated and name == "engine"
        output_Q = np.ones_like(self.requests.output_Q) if prefills else self.requests.output_Q
        if is_too_long(self.requests.prompt_Q, output_Q, engine, tokens).all():
            shortest = int((self.requests.prompt_Q + output_Q).min())
            return [
                f"requests: none fits: the shortest has {shortest} tokens, {name} holds {min(limit or tokens, tokens)};"
                " use shorter ones, a longer max_model_len, or more memory"
            ]
        return []


def kv_tokens(service: Service, engine: EngineConfig) -> int:
    """Tokens of KV cache of each data-parallel rank of an instance, whole blocks; 0 where the weights leave no room.

    What is left of `gpu_memory_utilization` of a device's memory after weights, activations of
    `max_num_batched_tokens`, and what `max_num_seqs` requests hold at any length (full windows of layers that have
    one, states); on the fullest pipeline stage. Memory of CUDA graphs and of the runtime is not counted.
    `num_gpu_blocks_override` goes before all that.
    """
    if engine.num_gpu_blocks_override is not None:
        return engine.num_gpu_blocks_override * engine.block_size
    usable_bytes = engine.gpu_memory_utilization * service.cluster.device.memory.capacity_bytes
    fewest = maxsize
    for fixed_bytes, held_bytes, token_bytes in _fixed_bytes(service.model, engine):
        left_bytes = usable_bytes - fixed_bytes - held_bytes
        if left_bytes <= 0:
            return 0
        if token_bytes:
            fewest = min(fewest, int(left_bytes / token_bytes))
    return fewest // engine.block_size * engine.block_size


def is_too_long(
    prompt_Q: NDArray[np.int64], output_Q: NDArray[np.int64], engine: EngineConfig, kv_tokens: int
) -> NDArray[np.bool_]:
    """Which requests can never be served: prompt and answer together are beyond `max_model_len` or a rank's cache.

    A run refuses them when they come, counts them as `num_dropped` and goes on; a service that can serve none of its
    requests is a mistake.

    kv_tokens: of a data-parallel rank, see `kv_tokens`.
    """
    return np.asarray(prompt_Q + output_Q > min(engine.max_model_len or kv_tokens, kv_tokens))


def _fixed_bytes(model: ModelSpec, engine: EngineConfig) -> list[tuple[float, float, float]]:
    """Of each stage: bytes of weights and activations, of what requests hold at any length, and of a further token."""
    layout, found = engine.layout, []
    if engine.num_speculative_tokens:
        model = replace(model, layers=(*model.layers, (*model.mtp_layers, model.layers[-1])[0]))
    for stage in memory.stages(model, layout.pp):
        parts = memory.device_bytes(
            stage, layout, requests_per_group=0, tokens_per_request=0, batched_tokens=engine.max_num_batched_tokens
        )
        token_bytes, request_bytes = memory.cache_bytes(stage, layout)
        found.append((sum(parts.values()), engine.max_num_seqs * request_bytes, token_bytes))
    return found
