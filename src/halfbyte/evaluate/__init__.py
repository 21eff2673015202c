"""Figures from a model."""
