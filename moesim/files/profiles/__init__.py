"""Measured tables of kernels as files, and readers of other tools' tables."""
