"""What a run is about, as far as its own words tell."""

from __future__ import annotations

_MEDICAL = ("medical", "doctor", "health", "clinic", "patient", "pharma")


def is_medical(text: str) -> bool:
    """Whether a data source or an objective speaks of medicine, which calls for a warning."""
    return any(word in text.lower() for word in _MEDICAL)
