"""Autoscaler: how many instances should be up? Decision, every so many seconds: a number of instances."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Autoscaling:
    """When instances come and go.

    Attributes:
        policy: a name of `AUTOSCALERS`.
        min_instances, max_instances: bounds of every decision.
        interval_s: seconds between decisions; 15 is Kubernetes' own.
        metric: what `target_utilisation` watches: "running", share of the requests that may run; "kv", share of the
            KV cache in use.
        target: the share that it aims at; for `queue_length` the waiting requests of an instance.
        stabilisation_s: seconds for which the highest number wanted lately is kept; 300 is Kubernetes' own.
        startup_s: seconds until a new instance serves; None takes the time to load its weights.
        load_bytes_per_s: rate at which a rank loads weights, where `startup_s` is None.
    """

    policy: str = "fixed"
    min_instances: int = 1
    max_instances: int = 1
    interval_s: float = 15.0
    metric: str = "running"
    target: float = 0.7
    stabilisation_s: float = 300.0
    startup_s: float | None = None
    load_bytes_per_s: float = 1e9

    def starting_s(self, rank_weight_bytes: float) -> float:
        """Seconds from the decision until a new instance serves, its ranks loading so many bytes each side by side."""
        return rank_weight_bytes / self.load_bytes_per_s if self.startup_s is None else self.startup_s

    def mistakes(self) -> list[str]:
        """What no autoscaling can be: one sentence each."""
        found = []
        if self.policy not in AUTOSCALERS:
            found.append(f"autoscaling.policy: {self.policy!r} is not one of {', '.join(AUTOSCALERS)}")
        if self.metric not in METRICS:
            found.append(f"autoscaling.metric: {self.metric!r} is not one of {', '.join(METRICS)}")
        if not 1 <= self.min_instances <= self.max_instances:
            found.append(
                "autoscaling: must have 1 <= min_instances <= max_instances, given"
                f" {self.min_instances} and {self.max_instances}"
            )
        found += [
            f"autoscaling.{name}: must be a number above 0, given {value!r}"
            for name in ("interval_s", "target", "load_bytes_per_s")
            if not 0 < (value := getattr(self, name)) < math.inf
        ]
        found += [
            f"autoscaling.{name}: must be 0 or more seconds, given {value!r}"
            for name in ("stabilisation_s", "startup_s")
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf
        ]
        return found


@dataclass(frozen=True)
class FleetLoad:
    """What an autoscaler sees at a decision.

    Attributes:
        now_s: the time.
        wanted: instances that were wanted last: up, or on their way.
        up: those that serve.
        waiting, running: requests.
        running_fraction, kv_fraction: mean over the instances that are up, of the requests that may run, and of the
            KV cache.
    """

    now_s: float
    wanted: int
    up: int
    waiting: int
    running: int
    running_fraction: float
    kv_fraction: float


METRICS = {"running": "running_fraction", "kv": "kv_fraction"}
"""Name of a metric -> field of `FleetLoad`."""

Decide = Callable[[FleetLoad], int]


@dataclass(frozen=True)
class Fixed:
    """As many as there are."""

    def start(self, config: Autoscaling) -> Decide:
        """Decisions of one run."""
        return lambda load: min(max(load.wanted, config.min_instances), config.max_instances)


def _stabilised(config: Autoscaling, desired: Callable[[FleetLoad], int]) -> Decide:
    """A wish within its bounds, never below the highest of the last `stabilisation_s` seconds."""
    lately: deque[tuple[float, int]] = deque()

    def decide(load: FleetLoad) -> int:
        wish = min(max(desired(load), config.min_instances), config.max_instances)
        lately.append((load.now_s, wish))
        while lately[0][0] < load.now_s - config.stabilisation_s:
            lately.popleft()
        highest = max(past for _, past in lately)
        return wish if wish >= load.wanted else min(max(load.wanted, config.min_instances), highest)

    return decide


@dataclass(frozen=True)
class TargetUtilisation:
    """ceil(instances x metric / target), unless the metric is within a tenth of the target.

    Instances on their way count as idle ones, so that what they will take is not asked for again.

    Source: Kubernetes' Horizontal Pod Autoscaler ("Algorithm details"): tolerance 0.1, downscale stabilisation.
    """

    tolerance: float = 0.1

    def start(self, config: Autoscaling) -> Decide:
        """Decisions of one run."""

        def desired(load: FleetLoad) -> int:
            ratio = float(getattr(load, METRICS[config.metric])) * load.up / max(load.wanted, 1) / config.target
            if abs(ratio - 1) <= self.tolerance + 1e-9:
                return load.wanted
            return math.ceil(load.wanted * ratio - 1e-9)

        return _stabilised(config, desired)


@dataclass(frozen=True)
class QueueLength:
    """One instance for every `target` waiting requests, besides those that what runs keeps busy.

    Instances that run requests are counted by their share of what may run: ceil(instances x running share + waiting /
    target). Source: the average-value metric of Kubernetes' Horizontal Pod Autoscaler over a queue, as KEDA scales;
    without the first term a queue that is just emptied would take away the instances that emptied it.
    """

    def start(self, config: Autoscaling) -> Decide:
        """Decisions of one run."""

        def desired(load: FleetLoad) -> int:
            return math.ceil(load.up * load.running_fraction + load.waiting / config.target - 1e-9)

        return _stabilised(config, desired)


AUTOSCALERS = {"fixed": Fixed, "target_utilisation": TargetUtilisation, "queue_length": QueueLength}
