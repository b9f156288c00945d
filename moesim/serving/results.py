"""The answer of a serving run: what every run answers, and what became of its requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.fleet import Slo
from moesim.results import Result
from moesim.service import Service
from moesim.serving.economics import economics_notes
from moesim.serving.find import RateSearch
from moesim.serving.metrics import ALL, Window, latencies, service_metrics
from moesim.serving.outcome import Outcome
from moesim.version import __version__

PHASE = "serving"
"""Under which `Result.breakdown_s` has the parts of a mean iteration, prompts and decoding mixed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ServingResult(Result):
    """A result with its requests.

    Attributes:
        outcome: times of every request, and the timeline, at the value.
        slo: what was promised.
        search: of the maximum rate, where one was asked for; the result is the run at the rate that it found.
        is_stopped: whether only the runs behind the intervals were stopped.
    """

    outcome: Outcome
    slo: Slo = field(default_factory=Slo)
    search: RateSearch | None = None
    is_stopped: bool = False

    @property
    def promises(self) -> dict[str, float]:
        """Name ("ttft", "tpot", "e2e") -> most seconds, of those that were promised."""
        most_s = {"ttft": self.slo.ttft_s, "tpot": self.slo.tpot_s, "e2e": self.slo.e2e_s}
        return {name: seconds for name, seconds in most_s.items() if seconds is not None}

    @property
    def is_partial(self) -> bool:
        """Whether the run, its intervals or the search were stopped before their end."""
        return self.is_stopped or self.outcome.is_partial or bool(self.search and self.search.is_partial)

    def as_json(self) -> dict[str, Any]:
        """The shape of `moesim run --json`, with the timeline, `is_partial`, and the search if there is one."""
        shape = super().as_json() | {
            "is_partial": self.is_partial,
            "timeline": {name: _plain(values) for name, values in self.outcome.timeline.items()},
        }
        if self.search:
            shape["search"] = asdict(self.search)
        return shape


def serving_result(
    service: Service,
    outcome: Outcome,
    window: Window = ALL,
    ends: Mapping[str, Outcome] | None = None,
) -> ServingResult:
    """What an outcome says, with intervals from runs at both ends of the believed efficiencies.

    The interval of a metric spans the three runs; that of energy and USD their assumed ranges as well.

    Args:
        ends: "low" and "high" -> outcome; None leaves the result without intervals.
    """
    metrics = service_metrics(service, outcome, window)
    intervals = {}
    if ends:
        # Slow devices that draw much, fast ones that draw little: as far apart as energy can be.
        low = service_metrics(service, ends["low"], window, power="high", price="high")
        high = service_metrics(service, ends["high"], window, power="low", price="low")
        for name, value in metrics.items():
            values = [value, *(end[name] for end in (low, high) if name in end)]
            if min(values) < max(values):
                intervals[name] = (min(values), max(values))
    total = outcome.num_iterations or 1
    return ServingResult(
        name=service.name,
        scenario=service.plain,
        engine="simulate",
        seed=service.seed,
        version=__version__,
        metrics=metrics,
        intervals=intervals,
        provenance=dict(outcome.shares),
        breakdown_s={PHASE: {part: seconds / total for part, seconds in outcome.parts_s.items()}},
        memory_bytes=dict(outcome.facts.get("memory_bytes", {})),
        warnings=serving_notes(service, outcome, window),
        outcome=outcome,
        slo=service.slo,
    )


def serving_notes(service: Service, outcome: Outcome, window: Window = ALL) -> tuple[str, ...]:
    """What a reader of the metrics should know: of the requests, the run, the window, cost."""
    said = []
    left = int((~np.isfinite(outcome.finish_s_Q) & ~outcome.dropped_Q).sum())
    if outcome.is_partial:
        said.append(
            f"PARTIAL: stopped at {outcome.seconds:.4g} s of simulated time; metrics are of what was done by then"
        )
    if left:
        said.append(f"{left} of {len(outcome.finish_s_Q)} requests were not answered: E2E and TPOT are of the others")
    if outcome.dropped_Q.any():
        said.append(f"{int(outcome.dropped_Q.sum())} requests were refused; none of them keeps the SLO")
    if window != ALL:
        start_s, end_s = window.of(outcome)
        said.append(
            f"measured from {start_s:g} to {end_s:g} s: latencies of the requests that came then, tokens that came out "
            "then; ITL, energy, the timeline's means and the breakdown are of the whole run"
        )
    single = int((np.isfinite(latencies(outcome)["e2e"]) & (outcome.generated_Q == 1)).sum())
    if single:
        said.append(f"{single} answers of one token have no TPOT")
    return (*said, *service.requests.notes, *outcome.notes, *economics_notes(service))


def _plain(values: NDArray[Any]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
