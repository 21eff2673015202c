"""Tokens from a model: prompt in, text out."""
