"""Offload with times that somebody measured: a trace replayed on one machine that is given by a few constants.

For systems whose kernels are not ours to price, and for users who have timed their own: seconds of an expert on each
unit, of everything else in a layer, and bytes a second of the link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.hardware import SOURCES
from moesim.offload.routing import counted_LE, routing_of
from moesim.offload.steps import OffloadedSteps
from moesim.offload.store import ExpertStore, Uses
from moesim.policies import REGISTRIES, SYSTEMS, Policies
from moesim.policies.cache import LRU
from moesim.policies.executor import OnDemand
from moesim.policies.predictor import NoPredictor
from moesim.policies.prefetch import NoPrefetch
from moesim.policies.view import View
from moesim.program.operation import Costs, Draft, Played
from moesim.routing.trace import RoutingTrace

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class UnitTimes:
    """Constants of one machine and model.

    Attributes:
        expert_bytes: weights of one expert; copy_bytes_per_s: of the link; start_s: of a copy before its first byte.
        gpu_expert_s: an expert on the GPU, whatever its tokens (it reads its weights); gpu_token_s: and for each token.
        cpu_expert_s, cpu_token_s: likewise on the CPU; infinite: it computes none. cold_s: once for each burst.
        near_expert_s, near_token_s: of an expert beside its memory, at least; and of each token.
        disk_bytes_per_s, disk_start_s: of reads into host memory. host_bytes_per_s: what that has for all of them.
        hop_s: tokens to the CPU and back.
    """

    expert_bytes: float
    copy_bytes_per_s: float
    gpu_expert_s: float = 0.0
    gpu_token_s: float = 0.0
    cpu_expert_s: float = np.inf
    cpu_token_s: float = 0.0
    cold_s: float = 0.0
    start_s: float = 0.0
    host_bytes_per_s: float = np.inf
    disk_bytes_per_s: float = np.inf
    disk_start_s: float = 0.0
    launch_s: float = 0.0
    hop_s: float = 0.0
    num_experts: int = 1
    gpu_shares_X: Floats = field(default_factory=lambda: np.zeros(len(SOURCES)))
    cpu_shares_X: Floats = field(default_factory=lambda: np.zeros(len(SOURCES)))
    copy_shares_X: Floats = field(default_factory=lambda: np.zeros(len(SOURCES)))
    near_shares_X: Floats = field(default_factory=lambda: np.zeros(len(SOURCES)))
    near_expert_s: float = np.inf
    near_token_s: float = 0.0
    flops_per_byte: float = 1.0

    @cached_property
    def bytes_E(self) -> Floats:
        """Of each expert."""
        return np.full(self.num_experts, self.expert_bytes)

    @cached_property
    def copy_s(self) -> float:
        """Of one expert."""
        return self.start_s + self.expert_bytes / self.copy_bytes_per_s

    def gpu_s(self, ids: Ids, load: Ids) -> Floats:
        """Of each expert on the GPU."""
        return np.asarray(self.gpu_expert_s + self.gpu_token_s * load, np.float64)

    def cpu_s(self, ids: Ids, load: Ids) -> Floats:
        """Of each expert on the CPU."""
        return np.asarray(self.cpu_expert_s + self.cpu_token_s * load, np.float64)

    def near_s(self, ids: Ids, load: Ids) -> Floats:
        """Of each expert beside its memory: the longer of reading it and computing its tokens."""
        return np.asarray(np.maximum(self.near_expert_s, self.near_token_s * load), np.float64)

    def near_start_s(self, tokens: int, is_beside: bool) -> float:
        """For tokens to travel there and back."""
        return self.hop_s


@dataclass(frozen=True)
class PolicySet:
    """Policies of four kinds, as objects."""

    cache: Any = field(default_factory=LRU)
    predictor: Any = field(default_factory=NoPredictor)
    prefetch: Any = field(default_factory=NoPrefetch)
    executor: Any = field(default_factory=OnDemand)

    @classmethod
    def named(cls, policies: Policies) -> PolicySet:
        """Those that a scenario names."""
        return cls(**{kind.name: REGISTRIES[kind.name][getattr(policies, kind.name)]() for kind in fields(cls)})

    @classmethod
    def of(cls, name: str) -> PolicySet:
        """Those of a named system."""
        return cls.named(Policies.of(SYSTEMS[name]))


@dataclass(frozen=True, eq=False)
class Replayed:
    """seconds_S: of each step; uses: of experts; busy_s: of each unit; steps: as they ran, those that were kept."""

    seconds_S: Floats
    uses: Uses
    busy_s: dict[str, float]
    steps: tuple[Played, ...] = ()


def replay(
    trace: RoutingTrace, rows: Sequence[Ids], times: UnitTimes, slots: int, policies: PolicySet | None = None, *,
    layer_s: float = 0.0, shared_s: float = 0.0, step_s: float = 0.0, is_prefill_S: Sequence[bool] = (),
    history: Ids | None = None, seed: int = 0, keep: int = 0, host_slots: int | None = None,
) -> Replayed:  # fmt: skip
    """Replay steps of a trace.

    Args:
        rows: of the tokens of each step.
        slots: experts that fit on the device, over all layers.
        layer_s: GPU work of each layer before its router has chosen; shared_s: after it, beside the experts.
        step_s: GPU work of each step behind the last layer.
        is_prefill_S: which steps compute prompts; none where nothing is said.
        history: rows of requests that are known beforehand.
        keep: steps that are kept as they ran.
        host_slots: experts that fit in host memory, the others are read from disk; None: all.
    """
    policies = policies or PolicySet()
    cache, predictor, L, E = policies.cache, policies.predictor, trace.num_layers, trace.num_experts
    view = View(L, E, trace.top_k)
    loads = [counted_LE(trace.expert_ids_TLK[row], E) for row in rows]
    needs_future = cache.needs_future or predictor.needs_future
    future_SLE = np.stack(loads).astype(np.int32) if needs_future else None
    known_LE = counted_LE(trace.expert_ids_TLK[history], E) if history is not None else None
    store = ExpertStore(view, slots, cache, future_SLE, known_LE)
    rng = np.random.default_rng(seed)
    steps = OffloadedSteps(
        store, replace(times, num_experts=E), policies.executor, policies.prefetch,
        predictor.start(view, future_SLE, rng), range(L), host_slots,
    )  # fmt: skip
    draft = Draft(1, {})
    seconds: list[float] = []
    for layer in range(L):
        seconds += [layer_s, 0.0, shared_s, 0.0]
        draft.add("attention", layer, "compute")
        draft.add("router", layer, "compute")
        router = len(draft.operations) - 1
        draft.add("shared_experts", layer, "compute")
        draft.add("experts", layer, "compute", after=(router,))
    draft.add("head", -1, "compute")
    program, shape = draft.program(), (len(seconds) + 1, 1)
    costs = Costs(np.array([*seconds, step_s]).reshape(shape), np.zeros(shape), np.zeros((shape[0], len(SOURCES))))
    found, kept = [], []
    for s, (row, load_LE) in enumerate(zip(rows, loads, strict=True)):
        routing = routing_of(
            trace, row, load_LE, int(trace.request_T[row[0]]), s < len(is_prefill_S) and is_prefill_S[s]
        )
        if s < keep:
            kept.append(steps.play(program, costs, routing))
            found.append(kept[-1].seconds)
        else:
            found.append(steps.pass_step(program, costs, routing))
    return Replayed(np.array(found), store.uses, dict(steps.busy_s), tuple(kept))
