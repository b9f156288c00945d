"""Costs: one thing, alone, in seconds, and where the number comes from."""
