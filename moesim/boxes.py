"""What fits a box: every model with every set of policies, and what would help most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moesim.estimate import estimate
from moesim.files.boxes import UPGRADES, Box
from moesim.model import ModelSpec
from moesim.scenario import Scenario
from moesim.verbs import run


@dataclass(frozen=True)
class Fit:
    """One model on the box.

    Attributes:
        rates: system -> tokens a second in decoding, best first; empty where it does not run at all.
        low, high: of the best one, over the believed efficiencies; ttft_s, hit_rate: of the best one.
        on_device: share of the experts that is on the device.
        gains: upgrade -> factor on the best rate, with whichever system is best then.
        reason: why it does not run, "" where it does.
    """

    model: str
    rates: dict[str, float] = field(default_factory=dict)
    low: float = 0.0
    high: float = 0.0
    ttft_s: float = 0.0
    hit_rate: float = 0.0
    on_device: float = 0.0
    gains: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def best(self) -> str:
        """The fastest system."""
        return next(iter(self.rates), "")

    def as_json(self) -> dict[str, Any]:
        """The machine-readable shape."""
        return {**vars(self), "best": self.best}


ALL_HERE = "all experts fit"


def fit_model(box: Box, model: ModelSpec, told: Callable[[], None] = lambda: None) -> Fit:
    """Try every system, then every upgrade with the two that were best. `told` is called after each run."""
    trace = box.trace(model)
    whole = box.scenario(model, trace, "on_demand")
    mistakes = whole.mistakes()
    if mistakes:
        return Fit(model.name, on_device=whole.policies.device_expert_fraction, reason=_short(mistakes[0]))
    fraction = whole.policies.device_expert_fraction
    systems = box.systems if fraction < 1 else ["on_demand"]
    rates = {}
    for system in systems:
        rates[system] = _rate(box.scenario(model, trace, system))
        told()
    rates = dict(sorted(rates.items(), key=lambda pair: -pair[1]))
    best = next(iter(rates))
    result = run(box.scenario(model, trace, best), "estimate")
    low, high = result.intervals.get("output_tokens_per_s", (rates[best],) * 2)
    gains = {}
    for upgrade in UPGRADES:
        better = [_rate(box.scenario(model, trace, system, upgrade)) for system in list(rates)[:2]]
        gains[upgrade] = max(better) / rates[best]
        told()
    if fraction == 1:
        rates = {ALL_HERE: rates[best]}
    hits = result.metrics.get("expert_hit_rate", 1.0)
    return Fit(model.name, rates, low, high, result.metrics["ttft_s"], hits, fraction, gains)


def _rate(scenario: Scenario) -> float:
    return estimate(scenario).metrics["output_tokens_per_s"]


def _short(mistake: str) -> str:
    """The first clause of a mistake."""
    return mistake.partition(";")[0].partition(" (")[0]


def fit_box(box: Box, told: Callable[[], None] = lambda: None) -> list[Fit]:
    """Every model of the box, those that run fastest first."""
    fits = [fit_model(box, model, told) for model in box.models]
    return sorted(fits, key=lambda fit: (-max(fit.rates.values(), default=0.0), fit.model))
