"""Copies of finished checkpoints elsewhere: a folder, or a repository of the hub."""
