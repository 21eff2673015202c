"""Steps, in order."""
