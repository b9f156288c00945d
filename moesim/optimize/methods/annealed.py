"""Annealed swaps over all layers at once, for any objective, as even as the slack asks: the method that is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.problem import Ints, Problem
from moesim.optimize.search import annealed, most_even


@dataclass(frozen=True)
class Annealed:
    """Where only the load of all tokens together counts, the most even placement is already that.

    sweeps, tries: see `moesim.optimize.search.annealed`. pair_donors: see `moesim.optimize.balance.balanced`.
    """

    sweeps: int = 120
    tries: int = 32
    seed: int = 0
    pair_donors: int = 64
    takes_uneven: ClassVar[bool] = True
    takes_copies: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False

    def place(self, problem: Problem, demand: Demand, clock: Clock) -> Ints:
        """From the most even placement."""
        if not problem.weights.of_traffic and not problem.weights.steps:
            return most_even(problem, demand.load_LE, self.pair_donors)
        return annealed(problem, demand, clock, sweeps=self.sweeps, tries=self.tries, seed=self.seed)
