"""What a run costs in energy and money: a model of a device's power, and prices per hour; both assumed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.costs.compute import arithmetic_flops_per_s, efficiency
from moesim.service import Service
from moesim.serving.outcome import Outcome

COMPUTING = ("attention", "router", "dense", "shared_experts", "experts", "head")
"""Parts of an iteration in which a device computes or reads memory; in the others it sends, or waits."""


@dataclass(frozen=True)
class Assumed:
    """A number that is assumed, and the range it is believed to lie in."""

    value: float
    low: float
    high: float

    def at(self, bound: str) -> float:
        """One of them: "value", "low" or "high"."""
        return float(getattr(self, bound))


POWER: dict[str, Assumed] = {
    "idle": Assumed(0.12, 0.08, 0.2),
    "waiting": Assumed(0.3, 0.15, 0.5),
    "memory_bound": Assumed(0.45, 0.2, 0.75),
    "compute_bound": Assumed(0.95, 0.8, 1.0),
}
"""Share of a device's power limit that it draws by what it does. Assumed, from: decoding on an H200 draws 137 to 300 of
700 W (arXiv 2605.11999, small batches); prompts draw near the limit, and generation less, on A100s (POLCA, arXiv
2308.12908). Idle and waiting are guesses."""

PRICES: dict[str, tuple[Assumed, str]] = {
    "a100-": (Assumed(1.30, 0.80, 3.00), "rents on demand in May 2026, long-tail clouds to hyperscalers"),
    "h100-": (Assumed(3.00, 1.99, 5.00), "rents on demand in May 2026, long-tail clouds to hyperscalers"),
    "h200-": (Assumed(4.00, 2.50, 7.00), "rents on demand in May 2026, long-tail clouds to hyperscalers"),
    "b200-": (Assumed(5.60, 3.75, 14.24), "rents on demand in June 2026, the lowest to a hyperscaler's"),
    "h800-": (Assumed(2.00, 2.00, 2.00), "the rent that DeepSeek assumes in its overview of its inference system"),
}
"""First letters of a device's name -> USD per device and hour, and where that is from. All are assumed: rents of one
GPU vary by a factor of 2.5 and more. `Fleet.usd_per_device_hour` replaces them."""


def price_of(service: Service) -> tuple[Assumed, str] | None:
    """USD per device and hour, and where they come from; None where the scenario and `PRICES` say nothing."""
    given = service.fleet.usd_per_device_hour
    if given is not None:
        return Assumed(given, given, given), "given"
    name = service.cluster.device.name
    return next((price for start, price in PRICES.items() if name.startswith(start)), None)


def compute_bound_s(service: Service, outcome: Outcome) -> float:
    """Device seconds that the arithmetic of all tokens takes at the rate that GEMMs reach.

    2 FLOP for each active parameter of the layers and token that was computed: prompts without what was cached, and
    answers. Attention over the context and the output head are not in it, and count as bound by memory.
    """
    model, device = service.model, service.cluster.device
    reached_Q = np.isfinite(outcome.first_token_s_Q)
    tokens = float(np.sum((outcome.prompt_Q - outcome.cached_Q)[reached_Q]) + np.sum(outcome.generated_Q))
    rate = arithmetic_flops_per_s(device, model.dtypes.experts) * efficiency(device, "gemm", "value")
    return 2.0 * (model.num_active_params - model.embedding_params) * tokens / rate


def energy_j(service: Service, outcome: Outcome, bound: str = "value") -> float:
    """Joules of the devices alone (no hosts, networks or cooling) over the whole run.

    A device is idle outside of iterations. Inside, the time that its arithmetic needs is bound by computing, the rest
    of the parts in `COMPUTING` by memory, all else is waiting; each draws its share in `POWER` of the power limit.

    Args:
        bound: "value", or the "low" or "high" end of `POWER`.
    """
    ranks = outcome.device_s / instance_seconds(outcome) if outcome.device_s else 0.0
    parts_s = {part: seconds * ranks for part, seconds in outcome.parts_s.items()}
    busy_s = min(sum(parts_s.values()), outcome.device_s)
    working_s = min(sum(parts_s.get(part, 0.0) for part in COMPUTING), busy_s)
    bound_s = min(compute_bound_s(service, outcome), working_s)
    spent_s = {
        "idle": outcome.device_s - busy_s,
        "waiting": busy_s - working_s,
        "memory_bound": working_s - bound_s,
        "compute_bound": bound_s,
    }
    return service.cluster.device.power_w * sum(POWER[what].at(bound) * seconds for what, seconds in spent_s.items())


def instance_seconds(outcome: Outcome) -> float:
    """Seconds that instances were up, summed over them; the run's length where the timeline does not know them."""
    time_s, up = outcome.timeline.get("time_s"), outcome.timeline.get("instances")
    if time_s is None or up is None or not len(time_s):
        return outcome.seconds
    return float(np.sum(np.diff(time_s, prepend=0.0) * up)) or outcome.seconds


def economics_notes(service: Service) -> tuple[str, ...]:
    """What a reader should know about energy and money."""
    device, price = service.cluster.device, price_of(service)
    if price is None:
        money = f"no price is known for {device.name}: give fleet.usd_per_device_hour for USD per million tokens"
    else:
        kind = "given" if price[1] == "given" else f"assumed: {price[1]}; fleet.usd_per_device_hour replaces it"
        money = f"USD at {price[0].value:g} an hour and device ({kind})"
    return money, f"energy of devices alone, by assumed shares of their {device.power_w:g} W"
