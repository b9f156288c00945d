"""Simulate: play every iteration on a SimPy clock.

Where nothing races (no shared resource, no timeline wanted) an iteration is one event whose length is the
array walk of its program; otherwise each operation of each rank is an event.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import simpy

from moesim.offload.run import OffloadedRun
from moesim.offload.streamed import streamed
from moesim.program.iterations import Iterations
from moesim.program.walk import walk
from moesim.results import Result
from moesim.scenario import Scenario
from moesim.simulate.player import Player
from moesim.tally import Tally


def simulate(scenario: Scenario, bound: str = "value", timeline: int = 0) -> Result:
    """Run a scenario on a clock.

    Args:
        bound: "value", or the "low" or "high" end of the believed efficiencies.
        timeline: iterations of each phase that are played operation by operation and leave their records.
    """
    if scenario.is_streamed:
        return streamed(scenario, bound, "simulate", timeline)
    env = simpy.Environment()
    iterations = Iterations(scenario, bound, is_played=True)
    tally = Tally(iterations, "simulate", timeline)
    offloaded = OffloadedRun(iterations) if scenario.is_offloaded else None
    env.process(_drive(env, iterations, offloaded, tally, timeline))
    env.run()
    return tally.result(offloaded.metrics() if offloaded else {})


def _drive(
    env: simpy.Environment, iterations: Iterations, offloaded: OffloadedRun | None, tally: Tally, timeline: int
) -> Generator[Any, Any, None]:
    """The scheduler of a closed batch: one iteration after another."""
    seen = {"prefill": 0, "decode": 0}
    for iteration in iterations:
        start_s = env.now
        if offloaded is not None:
            played = offloaded.play(iteration)
            yield env.timeout(played.seconds)
        elif iteration.program.is_static and seen[iteration.phase] >= timeline:
            played = walk(iteration.program, iteration.costs)
            yield env.timeout(played.seconds)
        else:
            player = Player(env, iteration.program, iteration.costs)
            yield player.done
            played = player.played()
        seen[iteration.phase] += 1
        tally.add(iteration, played, start_s)


__all__ = ["Player", "simulate"]
