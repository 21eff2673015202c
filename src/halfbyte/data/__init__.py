"""Rows from their source to batches of tokens and labels."""
