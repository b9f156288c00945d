"""Programs: a step of a model on a layout, lowered once, and the array walk over it."""

from moesim.program.operation import Choice, Costs, Draft, Fragment, Operation, Played, Program
from moesim.program.walk import account, walk

__all__ = ["Choice", "Costs", "Draft", "Fragment", "Operation", "Played", "Program", "account", "walk"]
