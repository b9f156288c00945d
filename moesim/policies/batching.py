"""Batching: how many sequences does a pass over the weights serve, and where is attention computed? Decision: a plan.

For models whose weights are streamed from host memory: each step costs the same few seconds for one sequence and for
a thousand, so throughput is a question of how many sequences fit where. "given" streams nothing: a scenario's own
requests are the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np


class Streams(Protocol):
    """What a step costs, see `moesim.costs.streaming`."""

    def host_sequences(self, tokens: float) -> float:
        """Sequences of so many tokens whose caches fit in host memory."""

    def busy_s(
        self, sequences: float, context: float, cpu_share: float = 0.0, kv_on_gpu: bool = False
    ) -> dict[str, float]:
        """Seconds of each resource in a step, which lasts as long as the longest."""

    def prefill_s(self, tokens: float) -> float:
        """Of so many prompt tokens."""


@dataclass(frozen=True)
class Job:
    """Requests of `prompt` and `answer` tokens, and room on the GPU for the caches or activations of a batch.

    gpu_sequences: sequences that the GPU holds at once, for policies that batch the whole model: a property of their
        implementation, so given.
    """

    prompt: float
    answer: float
    gpu_sequences: float = 1.0

    @property
    def context(self) -> float:
        """Tokens of a sequence, in the mean over its answer."""
        return self.prompt + self.answer / 2

    @property
    def longest(self) -> float:
        """Tokens of a sequence at its end."""
        return self.prompt + self.answer


@dataclass(frozen=True)
class Plan:
    """sequences in a step; cpu_share of attention; kv_on_gpu: caches stay there; mixes_prompts into others' steps."""

    sequences: float
    cpu_share: float = 0.0
    kv_on_gpu: bool = False
    mixes_prompts: bool = False

    def busy_s(self, streams: Streams, job: Job) -> dict[str, float]:
        """Seconds of each resource in a step, in which every sequence gains a token."""
        found = streams.busy_s(self.sequences, job.context, self.cpu_share, self.kv_on_gpu)
        if self.mixes_prompts:  # each step also computes as many prompt tokens as answers end in it
            found["compute"] *= 1 + job.prompt / job.answer
        return found

    def prefill_s(self, streams: Streams, job: Job) -> float:
        """Of the prompts of a batch, 0 where they are part of others' steps."""
        return 0.0 if self.mixes_prompts else streams.prefill_s(self.sequences * job.prompt)

    def tokens_per_s(self, streams: Streams, job: Job, counts_prefill: bool = True) -> float:
        """Generated tokens a second."""
        prefill_s = self.prefill_s(streams, job) if counts_prefill else 0.0
        return self.sequences * job.answer / (prefill_s + job.answer * max(self.busy_s(streams, job).values()))


@dataclass(frozen=True)
class _Plain:
    streams: ClassVar[bool] = True
    kv_on_gpu: ClassVar[bool] = False


@dataclass(frozen=True)
class Given(_Plain):
    """The requests of the scenario are one batch, and nothing is streamed but what other policies copy."""

    streams: ClassVar[bool] = False


@dataclass(frozen=True)
class ModelLevel(_Plain):
    """One batch through the whole model, all experts streamed, caches on the GPU.

    Source: ZeRO-Inference (DeepSpeed), as MoE-Gen (arXiv 2503.09716) and MoE-Lightning (arXiv 2411.11217) compare with.
    """

    kv_on_gpu: ClassVar[bool] = True

    def plan(self, streams: Streams, job: Job) -> Plan:
        """As many sequences as the GPU holds."""
        return Plan(min(job.gpu_sequences, streams.host_sequences(job.longest) or 1.0), kv_on_gpu=self.kv_on_gpu)


@dataclass(frozen=True)
class Continuous(ModelLevel):
    """The same with requests that come and go, so that the caches of the GPU are always full: sequences are as many as
    their tokens fit. Source: vLLM with weights on the CPU, as MoE-Gen (arXiv 2503.09716) compares with.

    gpu_sequences of the job are those of `reference` tokens, None: of the longest.
    """

    reference: float | None = None

    def plan(self, streams: Streams, job: Job) -> Plan:
        """Tokens of cache over tokens of a sequence."""
        return Plan(max(1.0, job.gpu_sequences * (self.reference or job.longest) / job.longest), kv_on_gpu=True)


@dataclass(frozen=True)
class FlexGen(ModelLevel):
    """A block of batches shares each layer's weights; caches are in host memory and cross the link to be attended to.

    Source: FlexGen (arXiv 2303.06865), section 4.
    """

    kv_on_gpu: ClassVar[bool] = False


@dataclass(frozen=True)
class MoELightning(_Plain):
    """Attention on the CPU: caches never cross the link. Source: MoE-Lightning (arXiv 2411.11217), section 4."""

    def plan(self, streams: Streams, job: Job) -> Plan:
        """All attention beside the caches."""
        return Plan(min(job.gpu_sequences, streams.host_sequences(job.longest)), cpu_share=1.0)


@dataclass(frozen=True)
class ModuleLevel(_Plain):
    """Each module has a batch of its own: attention in small ones until host memory is full of sequences, then each
    expert once over all its tokens. A share of attention is on the CPU.

    cpu_share: None looks for the best of 0, 0.05, ... 1.
    Source: MoE-Gen (arXiv 2503.09716), section 4.
    """

    cpu_share: float | None = None

    def plan(self, streams: Streams, job: Job) -> Plan:
        """All sequences whose caches fit in host memory."""
        sequences = streams.host_sequences(job.longest)
        shares = [self.cpu_share] if self.cpu_share is not None else np.arange(21) / 20
        return Plan(
            sequences, float(min(shares, key=lambda w: max(streams.busy_s(sequences, job.context, float(w)).values())))
        )


@dataclass(frozen=True)
class ModuleLevelGPU(ModuleLevel):
    """The same with all attention on the GPU."""

    cpu_share: float | None = 0.0


@dataclass(frozen=True)
class Overlapped(_Plain):
    """Prompts are computed in the steps in which others generate, attention of those on the CPU; host memory is full of
    sequences at all stages of their answers. Source: MoE-Lens (arXiv 2504.09345), section 4.
    """

    def plan(self, streams: Streams, job: Job) -> Plan:
        """Caches in host memory, half grown in the mean."""
        return Plan(streams.host_sequences(job.context), cpu_share=1.0, mixes_prompts=True)


BATCHINGS: Mapping[str, type[Any]] = {
    "given": Given,
    "model_level": ModelLevel,
    "continuous": Continuous,
    "flexgen": FlexGen,
    "moe_lightning": MoELightning,
    "module_level": ModuleLevel,
    "module_level_gpu": ModuleLevelGPU,
    "overlapped": Overlapped,
}
