"""Is a generator any good? Its samples beside requests that it was not fitted on, in every statistic of a trace."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.routing.generator import Shape, fit_generator
from moesim.routing.load import expert_load_LE
from moesim.routing.statistics import statistics
from moesim.routing.synthetic import zipf_trace
from moesim.routing.trace import RoutingTrace, joined

RANKS, BATCHES = (8, 32), (16, 64)
AIMED = ("rank_imbalance_ratio", "num_distinct_experts", "lru_miss_ratio")
"""Starts of the names of the statistics that should be within `AIM` of the held-out requests."""
AIM = 0.1


@dataclass(frozen=True)
class Verdict:
    """Means over layers of every statistic, by column and name.

    Attributes:
        columns: `held-out` (the truth), `fitted` (the other requests: what a perfect copy of them would score),
            `generated` (a sample of as many requests) and `zipf` (independent tokens, Zipf popularity fitted too).
        kept: where another shape was asked, by name [held-out, fitted shape, other shape] of what is kept across
            shapes: skew and miss ratios as they are, the others over what chance gives in their own shape.
        facts: requests, tokens, settings.
    """

    columns: Mapping[str, Mapping[str, float]]
    kept: Mapping[str, tuple[float, float]]
    facts: Mapping[str, str]

    def within_aim(self, name: str, column: str = "generated") -> bool | None:
        """Whether a statistic is within 10 % of the truth; None where that is not aimed at."""
        if not name.startswith(AIMED):
            return None
        truth = self.columns["held-out"][name]
        return bool(abs(self.columns[column][name] - truth) <= AIM * abs(truth))

    def as_json(self) -> dict[str, Any]:
        """Plain values; NaN as null."""
        names = self.columns["held-out"]
        return {
            "facts": dict(self.facts),
            "statistics": {
                name: {column: _plain(values[name]) for column, values in self.columns.items()}
                | {"within_aim": self.within_aim(name)}
                for name in names
            },
            "kept": {name: [_plain(value) for value in pair] for name, pair in self.kept.items()},
        }


def judge_generator(trace: RoutingTrace, other: Shape | None = None, *, seed: int = 0, **settings: Any) -> Verdict:
    """Fit to every second request, sample, and compare with the rest.

    Args:
        trace: at least four requests.
        other: a shape to sample as well, to see what it keeps.
        seed: of fit and sample.
        settings: as `fit_generator` takes them.

    Raises:
        ValueError: the trace has fewer than four requests.
    """
    requests, request_T = np.unique(trace.request_T, return_inverse=True)
    if len(requests) < 4:
        raise ValueError(
            f"judging needs at least 4 requests, half of them held out; trace {trace.name} has {len(requests)}"
        )
    fitted, held_out = trace.take(request_T % 2 == 0), trace.take(request_T % 2 == 1)
    generator = fit_generator(fitted, seed=seed, **settings)
    number = len(requests) // 2
    generated = joined(list(generator.sample(number, seed=seed)))
    exponent = zipf_exponent(fitted)
    mean_tokens = max(round(held_out.num_tokens / number), 1)
    zipf = zipf_trace(
        trace.num_layers, trace.num_experts, trace.top_k, num_requests=number, prompt_tokens=mean_tokens,
        output_tokens=0, exponent=exponent, seed=seed,
    )  # fmt: skip
    samples = {"held-out": held_out, "fitted": fitted, "generated": generated, "zipf": zipf}
    columns = {name: summary(sample) for name, sample in samples.items()}
    shown = [name for name, value in columns["held-out"].items() if "_by_" not in name and not math.isnan(value)]
    kept = {}
    if other is not None:
        reshaped = joined(list(generator.sample(number, seed=seed, shape=other)))
        kept = _kept(columns["held-out"], held_out, summary(reshaped), reshaped)
    return Verdict(
        {column: {name: values[name] for name in shown} for column, values in columns.items()},
        kept,
        {
            "trace": f"{trace.name}: {trace.num_layers} layers x {trace.num_experts} experts, top {trace.top_k}",
            "requests": f"{len(requests) - number} fitted ({fitted.num_tokens} tokens), {number} held out "
            f"({held_out.num_tokens} tokens)",
            "zipf": f"exponent {exponent:.2f}",
            "new tokens": f"{_new_fraction(generated, fitted):.0%} of the generated tokens are no fitted token in all "
            f"their layers ({_new_fraction(held_out, fitted):.0%} of the held-out ones)",
            **({"other shape": f"{other.num_layers} x {other.num_experts}, top {other.top_k}"} if other else {}),
        },
    )


def summary(trace: RoutingTrace) -> dict[str, float]:
    """Mean over layers of each of the `statistics`, with the miss ratios of caches in place of their hit ratios."""
    ranks = [ep for ep in RANKS if trace.num_experts % ep == 0]
    means = {}
    for name, values in statistics(trace, ep=ranks, batches=BATCHES).items():
        known = values[~np.isnan(values)]
        mean = float(known.mean()) if len(known) else math.nan
        means[name.replace("hit_ratio", "miss_ratio")] = 1 - mean if "hit_ratio" in name else mean
    return means


def zipf_exponent(trace: RoutingTrace) -> float:
    """The exponent s of popularity 1 / rank^s that makes the loads of all layers, each sorted, likeliest.

    The likelihood is concave in s, so a search by thirds finds its top, in 0..3 to 0.001.
    """
    load_E = np.sort(expert_load_LE(trace), axis=1)[:, ::-1].sum(axis=0)
    log_rank_E = np.log(np.arange(1, trace.num_experts + 1))

    def likelihood(s: float) -> float:
        return float(-s * (load_E * log_rank_E).sum() - load_E.sum() * np.log(np.exp(-s * log_rank_E).sum()))

    low, high = 0.0, 3.0
    while high - low > 1e-3:
        third = (high - low) / 3
        low, high = (low + third, high) if likelihood(low + third) < likelihood(high - third) else (low, high - third)
    return (low + high) / 2


def _kept(
    truth: Mapping[str, float], held_out: RoutingTrace, sampled: Mapping[str, float], reshaped: RoutingTrace
) -> dict[str, tuple[float, float]]:
    """What two shapes can be compared in: skews as they are, sizes as shares of E, the rest over its chance value."""
    found = {}
    for name in truth:
        if "_by_" in name or name not in sampled:
            continue
        if name.startswith(("rank_imbalance", "load_skew")):
            found[name] = (truth[name], sampled[name])
        elif (chance := f"{name}_by_chance") in truth and "miss_ratio" not in name:
            over = "bits" not in name
            pair = [m[name] / m[chance] if over else m[name] - m[chance] for m in (truth, sampled)]
            found[f"{name} {'/' if over else '-'} chance"] = (pair[0], pair[1])
    for share in (4, 2):
        pair = [
            m[f"lru_miss_ratio_{max(1, trace.num_experts // share)}_experts"]
            for m, trace in ((truth, held_out), (sampled, reshaped))
        ]
        found[f"lru_miss_ratio at E / {share}"] = (pair[0], pair[1])
    return {name: pair for name, pair in found.items() if not any(map(math.isnan, pair))}


def _new_fraction(trace: RoutingTrace, fitted: RoutingTrace) -> float:
    """Share of tokens whose experts, over all layers, are those of no fitted token."""
    paths = [np.ascontiguousarray(t.expert_ids_TLK).reshape(t.num_tokens, -1) for t in (trace, fitted)]
    seen = {row.tobytes() for row in paths[1]}
    return 1 - sum(row.tobytes() in seen for row in paths[0]) / trace.num_tokens


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
