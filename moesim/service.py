"""A service: instances of a model on a machine, the traffic that they get, and what is promised to its users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np

from moesim.costs.calibration import Calibration
from moesim.costs.measured import MeasuredTables
from moesim.hardware import Cluster
from moesim.model import ModelSpec
from moesim.requests import Requests
from moesim.routing.trace import RoutingTrace


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


@dataclass(frozen=True)
class Fleet:
    """Instances and who gets which request.

    Attributes:
        num_instances: of the one kind; None makes as many as the machine holds.
        num_prefill_instances, num_decode_instances: where prompts and answers are computed apart, instead.
        router: a name of `ROUTERS`.
        usd_per_device_hour: what a device costs; None takes what is assumed of its kind
            (`moesim.serving.economics.PRICES`).
    """

    num_instances: int | None = None
    num_prefill_instances: int = 0
    num_decode_instances: int = 0
    router: str = "least_loaded"
    usd_per_device_hour: float | None = None


@dataclass(frozen=True)
class Slo:
    """What is promised; None where nothing is. Goodput counts the requests that keep all of it.

    Attributes:
        ttft_s, tpot_s, e2e_s: most seconds to the first token, for each one after it, and in all.
        attainment: share of the requests that must keep it, for the maximum rate.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    attainment: float = 0.9


@dataclass(frozen=True, eq=False)
class Service:
    """Everything that a serving run needs.

    engine, decode_engine: of all instances (of those that prefill, where there are two kinds), and of those that decode.
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
