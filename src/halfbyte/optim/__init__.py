"""Optimizers and schedules that run on the device without a host value."""
