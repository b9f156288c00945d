"""Fitting the few constants that kernels do not show to real runs, and how sure the predictions are then."""
