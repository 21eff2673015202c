"""Kernels tried before a run depends on them."""
