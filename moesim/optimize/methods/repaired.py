"""A few swaps from today's placement, only such as pay for the experts that they move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.problem import Ints, Problem
from moesim.optimize.search import annealed, most_even


@dataclass(frozen=True)
class Repaired:
    """Copies stay as many as they are; where nothing lies anywhere today, the most even placement.

    sweeps, tries: see `moesim.optimize.search.annealed`; all at no heat.
    """

    sweeps: int = 8
    tries: int = 16
    takes_uneven: ClassVar[bool] = True
    takes_copies: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False

    def place(self, problem: Problem, demand: Demand, clock: Clock) -> Ints:
        """From today's."""
        if problem.today is None:
            return most_even(problem, demand.load_LE)
        return annealed(problem, demand, clock, start_LP=problem.today, sweeps=self.sweeps, tries=self.tries, hot=0.0)
