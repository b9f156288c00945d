"""Methods of placement, one file each, by name; all keep one contract, and each names its source."""

from __future__ import annotations

from typing import ClassVar, Protocol

from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.methods.annealed import Annealed
from moesim.optimize.methods.anticorrelated import Anticorrelated
from moesim.optimize.methods.coclustering import CoClustering
from moesim.optimize.methods.exflow import ExFlow
from moesim.optimize.methods.hecate import Hecate
from moesim.optimize.methods.moetuner import MoeTuner
from moesim.optimize.methods.policy import CONTIGUOUS, EPLB, ROUND_ROBIN, HierarchicalEplb
from moesim.optimize.methods.polished import Polished
from moesim.optimize.methods.repaired import Repaired
from moesim.optimize.methods.shuffled import Shuffled
from moesim.optimize.methods.swaps import Swaps
from moesim.optimize.problem import Ints, Problem


class Method(Protocol):
    """What every method has.

    takes_uneven: ranks of unlike speeds or numbers of slots; takes_copies: more slots than experts; needs_pairs: a
    demand that knows what goes together, not loads alone."""

    takes_uneven: ClassVar[bool]
    takes_copies: ClassVar[bool]
    needs_pairs: ClassVar[bool]

    def place(self, problem: Problem, demand: Demand, clock: Clock) -> Ints:
        """The expert in each slot, int32 [L, P], each expert at least once in each layer; soon after time is up."""
        ...


METHODS: dict[str, Method] = {
    "annealed": Annealed(),
    "polished": Polished(),
    "swaps": Swaps(),
    "repaired": Repaired(),
    "eplb": EPLB,
    "eplb_hierarchical": HierarchicalEplb(),
    "exflow": ExFlow(),
    "moetuner": MoeTuner(),
    "coclustering": CoClustering(),
    "hecate": Hecate(),
    "anticorrelated": Anticorrelated(),
    "contiguous": CONTIGUOUS,
    "round_robin": ROUND_ROBIN,
    "shuffled": Shuffled(),
}
