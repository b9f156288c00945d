"""The most even placement: EPLB's copies packed longest first, then swaps, then moves of copies; compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.problem import Ints, Problem
from moesim.optimize.search import most_even


@dataclass(frozen=True)
class Swaps:
    """Looks at the load alone, of all tokens together."""

    takes_uneven: ClassVar[bool] = True
    takes_copies: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False

    def place(self, problem: Problem, demand: Demand, clock: Clock) -> Ints:
        """In milliseconds."""
        return most_even(problem, demand.load_LE)
