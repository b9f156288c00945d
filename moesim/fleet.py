"""A fleet of instances: how many, who gets which request, what goes wrong, and what is promised of it all."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from moesim.faults import ServingFault, overlapping
from moesim.policies.autoscaler import Autoscaling
from moesim.policies.router import ROUTERS


@dataclass(frozen=True)
class Fleet:
    """Instances and who gets which request.

    Attributes:
        num_instances: of the one kind; None makes as many as the machine holds.
        num_prefill_instances, num_decode_instances: where prompts and answers are computed apart, instead.
        router, decode_router: names of `ROUTERS`: who gets a request, and who its answer where that is apart.
        overlaps_transfer: whether the cache of each layer travels as soon as it is computed, rather than all of it
            after the prompt.
        autoscaling: when instances (that are not disaggregated) come and go.
        faults: what goes wrong; instances are numbered, those that prefill first.
        usd_per_device_hour: what a device costs; None takes what is assumed of its kind
            (`moesim.serving.economics.PRICES`).
    """

    num_instances: int | None = None
    num_prefill_instances: int = 0
    num_decode_instances: int = 0
    router: str = "least_loaded"
    decode_router: str = "least_loaded"
    overlaps_transfer: bool = True
    autoscaling: Autoscaling = field(default_factory=Autoscaling)
    faults: tuple[ServingFault, ...] = ()
    usd_per_device_hour: float | None = None

    @property
    def is_disaggregated(self) -> bool:
        """Whether prompts and answers are computed apart."""
        return bool(self.num_prefill_instances or self.num_decode_instances)

    def mistakes(self, num_devices: int, engine_ranks: int, decode_ranks: int | None) -> list[str]:
        """What keeps a fleet from being one, or from fitting on so many devices.

        engine_ranks, decode_ranks: devices of an instance; None where no engine of its own decodes.
        """
        found = self._decision_mistakes(num_devices, engine_ranks)
        prefill, decode, num = self.num_prefill_instances, self.num_decode_instances, self.num_instances
        if not self.is_disaggregated:
            if decode_ranks is not None:
                found.append("decode_engine: is of instances that decode alone; give fleet.num_decode_instances")
            if num is not None and num < 1:
                found.append(f"fleet.num_instances: must be at least 1, given {num}")
            needed, said = (num or 1) * engine_ranks, f"num_instances = {num or 1}"
        else:
            if min(prefill, decode) < 1:
                found.append(
                    "fleet.num_prefill_instances, num_decode_instances: come together, both at least 1, given "
                    f"{prefill} and {decode}"
                )
            if num is not None:
                found.append("fleet.num_instances: prompts and answers are computed apart; leave it out")
            needed = prefill * engine_ranks + decode * (decode_ranks or engine_ranks)
            said = f"num_prefill_instances = {prefill} and num_decode_instances = {decode}"
        if needed > num_devices:
            found.append(
                f"fleet: {said} need {needed} devices, the machine has {num_devices}; use fewer or smaller ones"
            )
        if found:
            return found
        first, further = self.sizes(num_devices, engine_ranks)
        for fault in self.faults:
            ranks = engine_ranks if fault.instance < first else decode_ranks or engine_ranks
            found += fault.mistakes(first + further, ranks)
        return found

    def sizes(self, num_devices: int, engine_ranks: int) -> tuple[int, int]:
        """Instances that take requests, as many as there ever are, and instances that decode alone."""
        if self.is_disaggregated:
            return self.num_prefill_instances, self.num_decode_instances
        if self.autoscaling.policy != "fixed":
            return self.autoscaling.max_instances, 0
        return self.num_instances or num_devices // engine_ranks, 0

    def _decision_mistakes(self, num_devices: int, engine_ranks: int) -> list[str]:
        """Of routers, autoscaling and faults, each for itself."""
        found = [
            f"fleet.{key}: unknown {name!r}; one of {', '.join(ROUTERS)} would do"
            for key in ("router", "decode_router")
            if (name := getattr(self, key)) not in ROUTERS
        ]
        scaling = self.autoscaling
        found += [f"fleet.{text}" for text in scaling.mistakes()] + overlapping(self.faults)
        if scaling.policy != "fixed":
            if self.is_disaggregated:
                found.append("fleet.autoscaling: instances that prefill or decode alone are not scaled; leave it out")
            if (most := scaling.max_instances * engine_ranks) > num_devices:
                found.append(
                    f"fleet.autoscaling.max_instances: {scaling.max_instances} need {most} devices, the machine has "
                    f"{num_devices}; use fewer or smaller ones"
                )
        if self.usd_per_device_hour is not None and not 0 <= self.usd_per_device_hour < inf:
            found.append(f"fleet.usd_per_device_hour: must be 0 or more, given {self.usd_per_device_hour}")
        return found


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

    def mistakes(self) -> list[str]:
        """One sentence per number that cannot be."""
        found = [
            f"slo.{key}: must be above 0, given {value}"
            for key in ("ttft_s", "tpot_s", "e2e_s")
            if (value := getattr(self, key)) is not None and not value > 0
        ]
        if not 0 < self.attainment <= 1:
            found.append(f"slo.attainment: must lie in 0..1, above 0, given {self.attainment}")
        return found
