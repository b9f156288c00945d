"""Programs: a step of a model on a layout, lowered once, and the array walk over it."""

from moesim.program.operation import Costs, Draft, Operation, Played, Program
from moesim.program.walk import account, walk

__all__ = ["Costs", "Draft", "Operation", "Played", "Program", "account", "walk"]
