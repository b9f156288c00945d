"""Estimate: walk every iteration with arrays; no queues, no clock but a sum."""

from __future__ import annotations

from moesim.offload.run import OffloadedRun
from moesim.offload.streamed import streamed
from moesim.program.iterations import Iterations
from moesim.program.walk import walk
from moesim.results import Result
from moesim.scenario import Scenario
from moesim.tally import Tally


def estimate(scenario: Scenario, bound: str = "value", timeline: int = 0) -> Result:
    """Run a scenario without queues.

    Args:
        bound: "value", or the "low" or "high" end of the believed efficiencies.
        timeline: iterations of each phase that leave their records.
    """
    if scenario.is_streamed:
        return streamed(scenario, bound, "estimate", timeline)
    iterations = Iterations(scenario, bound)
    tally, now_s = Tally(iterations, "estimate", timeline), 0.0
    offloaded = OffloadedRun(iterations) if scenario.is_offloaded else None
    for iteration in iterations:
        played = offloaded.play(iteration) if offloaded else walk(iteration.program, iteration.costs)
        tally.add(iteration, played, now_s)
        now_s += played.seconds
    return tally.result(offloaded.metrics() if offloaded else {})
