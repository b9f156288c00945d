"""A scenario: everything that one run needs, checked and ready."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

import numpy as np

from moesim.costs import memory
from moesim.costs.calibration import Calibration
from moesim.costs.measured import MeasuredTables
from moesim.faults import Faults
from moesim.hardware import Cluster
from moesim.layout import Layout, Placement
from moesim.model import BYTES_PER_PARAM, Experts, ModelSpec
from moesim.policies import REGISTRIES, Policies
from moesim.policies.batching import BATCHINGS
from moesim.policies.cache import CACHES
from moesim.policies.collective import ALL_TO_ALLS
from moesim.policies.executor import EXECUTORS
from moesim.policies.placement import PLACEMENTS
from moesim.policies.predictor import PREDICTORS
from moesim.policies.prefetch import PREFETCHERS
from moesim.routing.trace import RoutingTrace
from moesim.workload import Workload


def _is_of(name: str, device: str) -> bool:
    """Whether another source's name, such as h100_sxm, is of the device, such as h100-sxm-80gb."""
    return set(re.split("[-_]", name.lower())) <= set(re.split("[-_]", device.lower()))


@dataclass(frozen=True, eq=False)
class Scenario:
    """One model on one machine, laid out one way, under one load, with one set of policies.

    tables: measured kernels of the machine's device; where they do not reach, rooflines stand.
    calibration: constants fitted to real runs, and how far predictions with them were off.
    plain: the scenario as plain data, as written in its file, for the record.
    placement: where experts lie, read from the file that `policies.placement` names; None where that names a policy.
    """

    name: str
    model: ModelSpec
    cluster: Cluster
    layout: Layout
    workload: Workload
    trace: RoutingTrace
    policies: Policies = field(default_factory=Policies)
    tables: MeasuredTables = field(default_factory=MeasuredTables)
    calibration: Calibration | None = None
    faults: Faults = field(default_factory=Faults)
    engine: str = "simulate"
    seed: int = 0
    plain: Mapping[str, Any] = field(default_factory=dict)
    placement: Placement | None = None

    def stream(self, consumer: str) -> np.random.Generator:
        """The consumer's own stream of random numbers, which no other consumer moves."""
        return np.random.default_rng([self.seed, crc32(consumer.encode())])

    @property
    def is_offloaded(self) -> bool:
        """Whether some experts live in host memory, or are computed beside the device's own."""
        executor = EXECUTORS.get(self.policies.executor)
        if self.is_streamed:
            return False
        return self.policies.device_expert_fraction < 1 or getattr(executor, "needs", "") == "near"

    @property
    def is_streamed(self) -> bool:
        """Whether all weights cross the host link in every step, for batches that a policy chooses."""
        return bool(getattr(BATCHINGS.get(self.policies.batching), "streams", False))

    @property
    def needs_history(self) -> bool:
        """Whether a policy wants the loads of requests that are not replayed."""
        cache = CACHES.get(self.policies.cache)
        places = PLACEMENTS.get(self.policies.placement)
        is_fitted = self.placement is not None or bool(places and places.needs_load)
        return is_fitted or bool(self.is_offloaded and cache and cache.needs_history)

    def memory_bytes(self) -> dict[str, float]:
        """Bytes by part on the fullest device, and its capacity."""
        longest = self.workload.prompt_tokens
        if longest is None:
            longest = int(np.bincount(self.trace.request_T[~self.trace.is_decode_T]).max(initial=1))
        stages = [
            memory.device_bytes(
                stage,
                self.layout,
                requests_per_group=-(-self.workload.num_requests // self.layout.attention.dp),
                tokens_per_request=longest + self.workload.output_tokens,
                batched_tokens=max(self.workload.max_num_batched_tokens, longest),
                device_expert_fraction=self.policies.device_expert_fraction,
            )
            for stage in memory.stages(self.model, self.layout.pp)
        ]
        fullest = max(stages, key=lambda parts: sum(parts.values()))
        return fullest | {"capacity": self.cluster.device.memory.capacity_bytes}

    def host_bytes(self) -> tuple[float, float]:
        """Experts that are not on the device, and the memory of the node's host."""
        h, layers = self.model.hidden_size, self.model.moe_layers
        routed = sum(ffn.routed_params(h) for i in layers if isinstance(ffn := self.model.layers[i].ffn, Experts))
        away = (1 - self.policies.device_expert_fraction) * BYTES_PER_PARAM[self.model.dtypes.experts] * routed
        return away, self.cluster.host_memory_bytes

    def fitting_expert_fraction(self) -> float:
        """The largest share of each layer's experts, in whole experts, that fits on the device beside all else; 0 if
        nothing does."""
        if not self.model.moe_layers:
            return 1.0
        whole = replace(self, policies=replace(self.policies, device_expert_fraction=1.0)).memory_bytes()
        experts, num_experts = whole.pop("experts"), self.model.experts.num_experts
        room = whole.pop("capacity") - sum(whole.values())
        return float(np.clip(np.floor(num_experts * room / experts), 0, num_experts)) / num_experts

    def warnings(self) -> list[str]:
        """What the reader of a result should know about where its routing and its tables come from."""
        return source_warnings(self.trace, self.tables, self.calibration, self.cluster.device.name)

    def mistakes(self) -> list[str]:
        """Every rule that the parts break together, one sentence each; an empty list for a sound scenario."""
        found = self.layout.mistakes(self.model, self.cluster.num_ranks) + self.workload.mistakes()
        found += self._policy_mistakes() + self._network_mistakes() + trace_mistakes(self.trace, self.model)
        if any(layer.cross for layer in self.model.layers):
            found.append(
                f"model: {self.model.name!r} is an encoder-decoder, which no step is lowered for yet; use a decoder"
            )
        if self.calibration and self.calibration.needs_tables != bool(self.tables.tables):
            wanted = "give those tables as the profile" if self.calibration.needs_tables else "leave the profile out"
            found.append(f"calibration: fitted with kernels of {self.calibration.kernels!r}; {wanted}")
        if self.engine not in ("simulate", "estimate"):
            found.append(f'engine: must be "simulate" or "estimate", given {self.engine!r}')
        if found or self.is_streamed:
            return found
        used = self.memory_bytes()
        capacity = used.pop("capacity")
        if sum(used.values()) > capacity:
            parts = ", ".join(f"{name} {value / 2**30:.1f}" for name, value in used.items() if value)
            found.append(
                f"memory: needs {sum(used.values()) / 2**30:.1f} GiB on one {self.cluster.device.name} of "
                f"{capacity / 2**30:.1f} GiB ({parts} GiB); use more devices, fewer requests or tokens, a smaller "
                "dtype, or policies.device_expert_fraction below 1"
            )
        return found

    def _policy_mistakes(self) -> list[str]:
        found = []
        for kind, registry in REGISTRIES.items():
            if kind == "placement" and self.placement is not None:
                routed, slots = self.model.experts, self.layout.num_redundant_experts
                found += self.placement.mistakes(
                    len(self.model.moe_layers), routed.num_experts, routed.num_experts + slots
                )
            elif (name := getattr(self.policies, kind)) not in registry:
                found.append(f"policies.{kind}: unknown {name!r}; one of {', '.join(registry)} would do")
        fraction = self.policies.device_expert_fraction
        if not 0 <= fraction <= 1:
            found.append(f"policies.device_expert_fraction: must lie in 0..1, given {fraction}")
        elif fraction < 1:
            if self.cluster.num_ranks != 1:
                found.append(
                    f"policies.device_expert_fraction: experts in host memory are modelled on one device, the machine "
                    f"has {self.cluster.num_ranks}; use a machine with one device, or 1.0"
                )
            if self.cluster.host is None:
                found.append("policies.device_expert_fraction: the machine has no host memory to keep experts in")
        if self.needs_history and len(np.unique(self.trace.request_T)) < 2:
            found.append(
                f"policies: placement {self.policies.placement!r} or cache {self.policies.cache!r} goes by the load of "
                f"requests that are not replayed; trace {self.trace.name!r} has one request"
            )
        found += self._streaming_mistakes() if self.is_streamed else []
        return found + (self._offload_mistakes() if self.is_offloaded else [])

    def _streaming_mistakes(self) -> list[str]:
        """Of what a machine must have for weights to stream."""
        key, host = f"policies.batching: {self.policies.batching!r}", self.cluster.host
        if self.cluster.num_ranks != 1 or host is None:
            return [f"{key} streams weights to one device from its host's memory; use a machine with both"]
        found = []
        if self.workload.num_speculative_tokens:
            found.append(f"{key} does not draft; set workload.num_speculative_tokens to 0")
        longest = self.workload.output_tokens + (self.workload.prompt_tokens or 1)
        needed = self.model.weight_bytes + longest * self.model.kv_bytes_per_token
        room = self.cluster.host_memory_bytes
        if needed > room:
            found.append(
                f"memory: weights and the cache of one request are {needed / 2**30:.0f} GiB, host memory has "
                f"{room / 2**30:.0f} GiB; use a smaller dtype, or a larger host_memory_bytes of the node"
            )
        return found

    def _offload_mistakes(self) -> list[str]:
        """Of policies that only experts in host memory need."""
        policies, found = self.policies, []
        if getattr(PREDICTORS.get(policies.predictor), "needs_guesses", False) and not self.trace.predicted_HTLW:
            found.append(
                f"policies.predictor: {policies.predictor!r} needs the next layers' predicted experts, which trace "
                f'{self.trace.name!r} has not; use "oracle_stated", "none" or a trace captured with predictions'
            )
        if policies.predictor == "none" and getattr(PREFETCHERS.get(policies.prefetch), "needs_predictions", False):
            found.append(
                f"policies.prefetch: {policies.prefetch!r} needs a predictor; set policies.predictor to "
                f'{", ".join(name for name in PREDICTORS if name != "none")}, or prefetch to "none"'
            )
        host, disk, unit = self.cluster.host, self.cluster.disk, getattr(EXECUTORS.get(policies.executor), "needs", "")
        away, room = self.host_bytes()
        if host is not None and away > room and (disk is None or unit == "near"):
            found.append(
                f"memory: {away / 2**30:.0f} GiB of experts stay in host memory, which has {room / 2**30:.0f} GiB; "
                "use a smaller dtype, a larger host_memory_bytes of the node, more experts on the device, or a node "
                'with a disk, such as disk = "nvme-pcie4"'
            )
        elif disk is not None and away > room and away > disk.memory.capacity_bytes:
            found.append(
                f"memory: {away / 2**30:.0f} GiB of experts fit neither in host memory nor on the disk of "
                f"{disk.memory.capacity_bytes / 2**30:.0f} GiB; use a smaller dtype or a larger disk"
            )
        if unit == "cpu" and (host is None or not host.flops_per_s):
            found.append(f"policies.executor: {policies.executor!r} needs a CPU, which {self.cluster.name!r} has not")
        if unit == "near" and self.cluster.near is None:
            found.append(
                f"policies.executor: {policies.executor!r} needs a near-data unit; {self.cluster.name!r} has none; "
                'use a machine with one, such as "duplex-x1" or "monde-a100"'
            )
        return found

    def _network_mistakes(self) -> list[str]:
        """Of the network, of what is wrong with it, and of batches that overlap on it."""
        policies, spread = self.policies, self.layout.experts.ep > 1
        found = self.faults.mistakes(self.cluster)
        if policies.network not in ("ports", "flows"):
            found.append(f'policies.network: must be "ports" or "flows", given {policies.network!r}')
        elif policies.network == "ports":
            if self.faults.links:
                found.append('faults.links: slow links are seen by flows only; set policies.network = "flows"')
            algorithm = ALL_TO_ALLS.get(policies.all_to_all)
            if algorithm is not None and algorithm.message is None:
                found.append(
                    f"policies.all_to_all: {policies.all_to_all!r} is known by its rounds of messages only; set "
                    'policies.network = "flows"'
                )
        if policies.all_to_all == "rails" and self.layout.num_ranks % self.cluster.devices_per_node:
            found.append("policies.all_to_all: 'rails' needs full nodes")
        if policies.two_batch_overlap:
            least = 2 * self.layout.attention.dp
            if self.is_offloaded:
                found.append(
                    "policies.two_batch_overlap: not with experts in host memory; set one of them to its default"
                )
            if not spread and self.layout.attention.tp == 1:
                found.append(
                    "policies.two_batch_overlap: there is nothing to overlap with: one device holds all experts"
                )
            if self.workload.num_requests < least:
                found.append(
                    f"policies.two_batch_overlap: needs two requests in each of {least // 2} groups, given "
                    f"num_requests = {self.workload.num_requests}; {least} would do"
                )
        found += self._pipeline_mistakes()
        if self.workload.num_speculative_tokens and self.is_offloaded:
            found.append(
                "workload.num_speculative_tokens: drafting is not modelled with experts in host memory; set it to 0"
            )
        return found

    def _pipeline_mistakes(self) -> list[str]:
        layout, per_node = self.layout, self.cluster.devices_per_node
        stage = layout.attention.num_ranks
        if layout.pp == 1:
            return []
        found = [
            f"layout: pp = {layout.pp} is not modelled together with {what}; set one of them to its default"
            for what, is_so in {
                "policies.two_batch_overlap": self.policies.two_batch_overlap,
                'policies.network = "flows"': self.policies.network == "flows",
                "workload.num_speculative_tokens": self.workload.num_speculative_tokens > 0,
                "policies.device_expert_fraction": self.is_offloaded,
            }.items()
            if is_so
        ]
        if stage % per_node and per_node % stage:
            found.append(f"layout: the {stage} ranks of a stage must be whole nodes of {per_node}, or divide one")
        if self.workload.num_requests < layout.pp * layout.attention.dp:
            found.append(
                f"layout: pp = {layout.pp} needs as many requests in each of {layout.attention.dp} groups, given "
                f"num_requests = {self.workload.num_requests}; {layout.pp * layout.attention.dp} would do"
            )
        return found


def source_warnings(
    trace: RoutingTrace, tables: MeasuredTables, calibration: Calibration | None, device: str
) -> list[str]:
    """What the reader of a result should know about where its routing, tables and constants come from."""
    found = []
    if trace.origin == "counts":
        found.append(
            "the routing is made from expert counts: the loads of the experts are the source's; which experts a "
            "token has together, and what follows what, is chance"
        )
    elif trace.origin != "trained":
        found.append(f"the routing is {trace.origin}, not that of a trained model")
    found += [
        f"the profile was measured on {other}, the machine has {device}: its kernels are priced as {other}'s"
        for other in sorted({table.device for table in tables.tables})
        if not _is_of(other, device)
    ]
    groups = calibration.facts.get("groups", []) if calibration else []
    if groups and not any(_is_of(word, device) for group in groups for word in group.split()):
        found.append(f"the calibration was fitted to {', '.join(groups)}; none of them ran on {device}")
    return found


def trace_mistakes(trace: RoutingTrace, model: ModelSpec) -> list[str]:
    """What keeps a trace from routing the tokens of a model: its shape."""
    if not model.moe_layers:
        return []
    routed = model.experts
    pairs = {
        "MoE layers": (trace.num_layers, len(model.moe_layers)),
        "experts": (trace.num_experts, routed.num_experts),
        "experts per token": (trace.top_k, routed.top_k),
    }
    return [
        f"trace: {trace.name!r} has {have} {what}, model {model.name!r} has {want}; use a trace of that shape, or "
        'made-up routing, such as "zipf:0.5"'
        for what, (have, want) in pairs.items()
        if have != want
    ]
