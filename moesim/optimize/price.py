"""What the terms of a placement cost in seconds: a line through simulated iterations with a few unlike placements.

The simulator prices the fullest rank's experts and both all-to-alls, whatever the machine and the way tokens travel; a
search needs that price of every swap. So some placements are simulated, on the requests that are placed by, and their
seconds laid on a line: of the fullest rank in each step, and of choices spread over nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from moesim.estimate import estimate
from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.methods import METHODS, Method
from moesim.optimize.methods.annealed import Annealed
from moesim.optimize.methods.shuffled import Shuffled
from moesim.optimize.of_scenario import halves
from moesim.optimize.problem import Problem, Weights
from moesim.optimize.score import Score, scored
from moesim.routing.trace import RoutingTrace
from moesim.scenario import Scenario

TERMS = ("steps", "spread")


@dataclass(frozen=True)
class Price:
    """Seconds of a decode iteration.

    even_s: where every rank is as full and no two choices of a token lie in different nodes.
    steps_s, spread_s: more, for each unit of these terms (see `Weights`) above 1 and above 0.
    error: how far the line is off the simulated placement that it fits worst, as a share.
    """

    even_s: float
    steps_s: float
    spread_s: float
    error: float

    def seconds(self, score: Score) -> float:
        """Of an iteration with a placement."""
        return self.seconds_at(score.steps, score.spread)

    def seconds_at(self, steps: float, spread: float = 0.0) -> float:
        """Of an iteration with these terms."""
        return self.even_s + self.steps_s * (steps - 1) + self.spread_s * spread

    @property
    def weights(self) -> Weights:
        """Terms weighed so that the objective falls by the share of an iteration's seconds that is saved.

        Raises:
            ValueError: no placement is faster than another.
        """
        if self.steps_s + self.spread_s <= 0:
            raise ValueError(
                "placement: iterations take as long wherever experts lie (weights are read, tokens do not "
                "count); weigh load, steps or node instead, or serve more requests"
            )
        return Weights(load=0.0, steps=self.steps_s / self.even_s, spread=self.spread_s / self.even_s)


def price_of(base: Scenario, problem: Problem, known: RoutingTrace) -> Price:
    """Of a scenario's decode iterations.

    Args:
        known: the requests that placements are made by; half of them is simulated here.

    Raises:
        ValueError: there are too few requests.
    """
    if len(np.unique(known.request_T)) < 2:
        raise ValueError(f"{base.name}: to price time, half of trace {base.trace.name!r} needs two requests or more")
    plain = replace(problem, weights=Weights())
    replayed = halves(replace(base, trace=known))[1]
    rows = np.flatnonzero(replayed.is_decode_T) if replayed.is_decode_T.any() else None
    demand = Demand.of(replayed, rows, base.workload.num_requests)
    quick = Annealed(sweeps=20, tries=8)
    asked: list[tuple[Method, Weights]] = [(METHODS["contiguous"], plain.weights), (METHODS["swaps"], plain.weights)]
    asked += [(Shuffled(seed), plain.weights) for seed in range(3)]
    asked += [(quick, Weights(load=0.0, steps=steps, spread=spread)) for steps, spread in ((1, 0), (0, 1), (1, 1))]
    terms, seconds = [], []
    for method, weights in asked:
        slot_LP = method.place(replace(plain, weights=weights), demand, Clock(30))
        score = scored(plain, slot_LP, demand)
        variant = replace(base, trace=known, placement=plain.as_placement(slot_LP))
        terms.append((1.0, score.steps - 1, score.spread))
        seconds.append(estimate(variant).metrics["tpot_s"])
    per, _ = nnls(np.array(terms), np.array(seconds))
    error = float(np.abs(np.array(terms) @ per / np.array(seconds) - 1).max())
    even_s, steps_s, spread_s = per.tolist()
    return Price(even_s, steps_s, spread_s, error)
