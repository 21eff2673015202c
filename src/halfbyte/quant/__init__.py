"""Frozen weights in 4 bits."""
