"""The run's record: typed events, one writer, one reader."""

from halfbyte.events.log import Emit, EventLog, Record, read_events

__all__ = ["Emit", "EventLog", "Record", "read_events"]
