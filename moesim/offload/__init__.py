"""Experts that do not fit: their places, the machine's clock, and the steps of a model over both."""
