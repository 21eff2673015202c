"""Base models, their loading into 4 bits, and their adapters."""
