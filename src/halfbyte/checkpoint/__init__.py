"""The whole state of a run, on disk."""
