"""Triton kernels of a Mixture-of-Experts layer and of decode attention, one file per operator.

Each file holds the kernel with its launcher, a torch reference in higher precision, FLOP and byte counts as plain
functions of the shape, and a list of cases from published models. Needs `pip install 'moesim[kernels]'`.

Array letters: T tokens, K choices per token, S slots = T x K, E experts, P padded rows, B blocks of rows.
"""
