"""Policies: one file per kind, each published policy a few lines with its paper; a registry at the bottom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesim.policies.autoscaler import AUTOSCALERS
from moesim.policies.batching import BATCHINGS
from moesim.policies.cache import CACHES
from moesim.policies.collective import ALL_TO_ALLS
from moesim.policies.executor import EXECUTORS
from moesim.policies.placement import PLACEMENTS
from moesim.policies.predictor import PREDICTORS
from moesim.policies.prefetch import PREFETCHERS
from moesim.policies.router import ROUTERS
from moesim.policies.systems import EXPERT_DTYPES, SYSTEMS

REGISTRIES: Mapping[str, Mapping[str, type]] = {
    "placement": PLACEMENTS,
    "cache": CACHES,
    "predictor": PREDICTORS,
    "prefetch": PREFETCHERS,
    "executor": EXECUTORS,
    "all_to_all": ALL_TO_ALLS,
    "batching": BATCHINGS,
}
"""Kind -> name -> class, of a scenario's `[policies]`."""

SERVING_REGISTRIES: Mapping[str, Mapping[str, type]] = {"router": ROUTERS, "autoscaler": AUTOSCALERS}
"""The same, of a fleet that serves."""


@dataclass(frozen=True)
class Policies:
    """The policies of a scenario, by name.

    device_expert_fraction: share of each layer's experts that device memory holds; the others stay in host memory, and
        cache, predictor, prefetch and executor say what happens to them. 1 keeps all of them on the device.
    batching: other than "given", all weights stream through the device in every step, and the policy chooses how many
        of the requests a step serves; what is said of experts on the device does not matter then.
    two_batch_overlap: each group's requests are cut in two batches; one computes while the other communicates.
    network: "ports": what limits a collective is each rank's own ports; "flows": routes over the topology, on whose
        links flows share (`simulate` plays them; `estimate` takes the fullest link).
    """

    placement: str = "contiguous"
    cache: str = "lru"
    predictor: str = "none"
    prefetch: str = "none"
    executor: str = "on_demand"
    device_expert_fraction: float = 1.0
    all_to_all: str = "flat"
    batching: str = "given"
    two_batch_overlap: bool = False
    network: str = "ports"

    @classmethod
    def of(cls, system: Mapping[str, str], device_expert_fraction: float = 1.0) -> Policies:
        """Those of a system, an entry of `SYSTEMS`."""
        given: Mapping[str, Any] = system
        return cls(**given, device_expert_fraction=device_expert_fraction)


__all__ = ["EXPERT_DTYPES", "REGISTRIES", "SERVING_REGISTRIES", "SYSTEMS", "Policies"]
