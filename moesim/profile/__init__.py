"""Timing operators on the machine at hand; with `capture` and `kernels`, all that knows torch."""
