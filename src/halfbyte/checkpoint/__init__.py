"""The state of a run on disk: written whole, checked before it is read."""
