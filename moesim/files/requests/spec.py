"""The table [requests]: which traffic a service gets, as a person writes it, and the rules that its keys have together.

[requests]                                  [requests]
arrivals = "gamma"                          arrivals = "replayed"
rate_per_s = 12.0                           file = "azure_conv.csv.gz"
cv = 2.0                                    rate_scale = 1.5
num_requests = 5000                         start_s = 600
prompt_tokens = {distribution = "lognormal", mean = 900, cv = 1.2, most = 32768}
output_tokens = 256
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from moesim.files.keys import nearest
from moesim.files.structure import structure

_OF = {
    "poisson": (("rate_per_s",), ("diurnal_depth", "diurnal_period_s")),
    "gamma": (("rate_per_s", "cv"), ("diurnal_depth", "diurnal_period_s")),
    "bursty": (("rate_per_s", "burst_ratio", "burst_fraction", "burst_s"), ("diurnal_depth", "diurnal_period_s")),
    "constant": (("rate_per_s",), ()),
    "at_once": ((), ()),
    "closed": (("concurrency",), ("think_s",)),
    "replayed": (("file",), ("rate_scale", "start_s")),
}
"""Of each kind of arrivals, the keys that it must have and those that it may have, beside lengths and extent."""
_SOME = ("arrivals", "num_requests", "duration_s", "file", "order", "prompt_tokens", "output_tokens")
MOST, MOST_TOKENS = 10**8, 10**9
"""Requests, and tokens of a length that is drawn."""
DISTRIBUTIONS = {"lognormal": ("mean", "cv"), "exponential": ("mean",), "uniform": ("low", "high")}


@dataclass(frozen=True)
class LengthSpec:
    """A distribution of lengths in tokens.

    Attributes:
        distribution: "lognormal" (mean, cv), "exponential" (mean; geometric, as lengths are whole), "uniform" (low to
            high, both included).
        most: longer ones are cut to it, which lowers the mean.
    """

    distribution: str
    mean: float | None = None
    cv: float | None = None
    low: int | None = None
    high: int | None = None
    most: int | None = None


@dataclass(frozen=True)
class RequestsSpec:
    """The table [requests].

    Prompts and answers that no instance can hold are no mistake, unless all are: a run refuses and counts them.

    Attributes:
        arrivals: "poisson", "gamma" (gaps with a coefficient of variation `cv`), "bursty" (calm and bursts in turn:
            `burst_ratio` times the rate for `burst_s` seconds in the mean, `burst_fraction` of the time), "constant",
            "at_once" (all at 0), "closed" (`concurrency` clients that wait for their answer, and then `think_s`), or
            "replayed" (at the times of `file`).
        rate_per_s: mean rate.
        diurnal_depth, diurnal_period_s: the rate swings by 1 + depth * sin(2 pi t / period).
        num_requests, duration_s: how many, or for how long; what is left out is the file's.
        prompt_tokens, output_tokens: a number, or a table as `LengthSpec`.
        file: requests, beside the scenario file or as a path. Without "replayed" only its times are not used.
        order: with other arrivals, "file" takes its requests in order, again from the first where they run out;
            "random" draws them with replacement, lengths alone.
        rate_scale, start_s: of a replay: gaps are divided by the one; requests before the other (in the file's time)
            are left out. Client profiles have their rates multiplied.
    """

    arrivals: str
    rate_per_s: float | None = None
    cv: float | None = None
    burst_ratio: float | None = None
    burst_fraction: float | None = None
    burst_s: float | None = None
    diurnal_depth: float | None = None
    diurnal_period_s: float | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    concurrency: int | None = None
    think_s: float | None = None
    prompt_tokens: int | dict[str, Any] | None = None
    output_tokens: int | dict[str, Any] | None = None
    file: str | None = None
    order: str | None = None
    rate_scale: float | None = None
    start_s: float | None = None

    def mistakes(self) -> list[str]:
        """Every rule that the keys break, one sentence each, beginning with the key."""
        if self.arrivals not in _OF:
            return [f"arrivals: unknown {self.arrivals!r}; {nearest(self.arrivals, _OF)}"]
        needed, allowed = _OF[self.arrivals]
        known = (*_SOME, *needed, *allowed)
        given = [item.name for item in fields(self) if getattr(self, item.name) is not None]
        found = [
            f"{key}: has no meaning with arrivals = {self.arrivals!r}{_instead(self.arrivals, key)}; leave it out"
            for key in given
            if key not in known
        ]
        found += [
            f"{key}: is missing; arrivals = {self.arrivals!r} needs it" for key in needed if getattr(self, key) is None
        ]
        return found + self._ranges() + self._lengths() + self._extent()

    def _ranges(self) -> list[str]:
        above = ("rate_per_s", "burst_s", "diurnal_period_s", "duration_s", "rate_scale")
        rules: dict[str, tuple[Callable[[float], bool], str]]
        rules = {key: (lambda x: 1e-9 <= x <= 1e9, "from 1e-9 to 1e9") for key in above}
        rules |= {key: (lambda x: 1 <= x < math.inf, "at least 1") for key in ("concurrency", "burst_ratio")}
        rules |= {key: (lambda x: 0 <= x < math.inf, "0 or more") for key in ("think_s", "start_s")}
        rules |= {
            "num_requests": (lambda x: 1 <= x <= MOST, f"from 1 to {MOST}"),
            "cv": (lambda x: 1e-3 <= x <= 1e3, "from 0.001 to 1000"),
            "burst_fraction": (lambda x: 0 < x < 1, "above 0 and below 1"),
            "diurnal_depth": (lambda x: 0 <= x < 1, "0 or more and below 1"),
        }
        found = [
            f"{key}: must be {rule}, given {value}"
            for key, (holds, rule) in rules.items()
            if (value := getattr(self, key)) is not None and not holds(value)
        ]
        if (self.diurnal_depth is None) != (self.diurnal_period_s is None):
            found.append("diurnal_depth: comes with diurnal_period_s; give both, such as 0.5 and 86400, or neither")
        if self.order is not None and self.arrivals == "replayed":
            found.append("order: has no meaning with arrivals = 'replayed', which keeps the file's; leave it out")
        elif self.order not in (None, "file", "random"):
            found.append(f'order: must be "file" or "random", given {self.order!r}')
        return found

    def _lengths(self) -> list[str]:
        keys = ("prompt_tokens", "output_tokens")
        given = [key for key in keys if getattr(self, key) is not None]
        if self.file is not None:
            return [f"{key}: the lengths are those of file = {self.file!r}; leave one of the two out" for key in given]
        found = [
            f"{key}: is missing; give a number, a table {{distribution = ...}}, or a file"
            for key in keys
            if key not in given
        ]
        if self.order is not None:
            found.append("order: has no meaning without a file; leave it out")
        for key in given:
            found += length_mistakes(getattr(self, key), key)
        return found if self.arrivals != "replayed" else []

    def _extent(self) -> list[str]:
        if self.arrivals == "replayed":
            return []
        if self.arrivals in ("closed", "at_once"):
            if self.duration_s is not None:
                return [f"duration_s: has no meaning with arrivals = {self.arrivals!r}; give num_requests"]
            return (
                ["num_requests: is missing; give it, or a file"]
                if self.num_requests is None and self.file is None
                else []
            )
        if self.num_requests is not None and self.duration_s is not None:
            return ["duration_s: num_requests says already how much; leave one of the two out"]
        if self.num_requests is None and self.duration_s is None and self.file is None:
            return ["num_requests: is missing; give it, duration_s, or a file"]
        seconds, rate = self.duration_s, self.rate_per_s or 0.0
        if seconds is not None and seconds * rate > MOST:
            return [f"duration_s: must bring at most {MOST} requests, given {seconds} s at {rate} a second"]
        return []


def length_of(value: int | dict[str, Any]) -> LengthSpec | int:
    """A length that `length_mistakes` found nothing wrong with."""
    return LengthSpec(**value) if isinstance(value, dict) else value


def length_mistakes(value: int | dict[str, Any], key: str) -> list[str]:
    """What is wrong with a length."""
    if not isinstance(value, dict):
        return [] if 1 <= value <= MOST_TOKENS else [f"{key}: must be from 1 to {MOST_TOKENS}, given {value}"]
    found: list[str] = []
    spec = structure(LengthSpec, value, key, found)
    if spec is None:
        return found
    if spec.distribution not in DISTRIBUTIONS:
        return [f"{key}.distribution: unknown {spec.distribution!r}; {nearest(spec.distribution, DISTRIBUTIONS)}"]
    needed = DISTRIBUTIONS[spec.distribution]
    found += [f"{key}.{name}: is missing; {spec.distribution!r} needs it" for name in needed if name not in value]
    found += [
        f"{key}.{name}: has no meaning with {spec.distribution!r}; it has {', '.join(needed)}"
        for name in value
        if name not in ("distribution", "most", *needed)
    ]
    for name in (*needed, "most"):
        low, high = (1e-3, 1000) if name == "cv" else (1, MOST_TOKENS)
        if name in value and not low <= value[name] <= high:
            found.append(f"{key}.{name}: must be from {low} to {high}, given {value[name]}")
    if not found and spec.low is not None and spec.high is not None and spec.low > spec.high:
        found.append(f"{key}.high: must be at least low = {spec.low}, given {spec.high}")
    return found


def _instead(arrivals: str, key: str) -> str:
    if arrivals == "replayed" and key == "rate_per_s":
        return ", which has the file's times (rate_scale changes their rate)"
    return ""
