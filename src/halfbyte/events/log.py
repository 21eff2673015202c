"""The run's record on disk: one writer, one reader, append only."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from halfbyte.errors import RunError
from halfbyte.events.types import EVENTS, Event
from halfbyte.foreign_json import parse_json

Emit = Callable[[Event], None]

FILE_NAME = "events.jsonl"


@dataclasses.dataclass(frozen=True)
class Record:
    """An event and when it was written (unix seconds)."""

    time: float
    event: Event


class EventLog:
    """Appends events to ``events.jsonl``; each line is flushed as it is written.

    Any thread may write: a line is written whole before the next one is. Listeners (the terminal, a
    notebook) are called with each event after it is on its way to the disk. Use it as a context
    manager or call ``close``. Raises RunError where the file is a link.
    """

    def __init__(self, folder: Path, *, listeners: list[Emit] | None = None) -> None:
        path = folder / FILE_NAME
        if path.is_symlink():  # in a folder of somebody else's it may lead to any file
            raise RunError(f"{path} is a link to another file, which a run's record never is.")
        torn = _ends_mid_line(path)
        # Half a surrogate pair, which UTF-8 refuses and a row can hold, becomes JSON's escape.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        if torn:  # a process died while writing: end its line, the reader passes over it
            self._file.write("\n")
        self.listeners: list[Emit] = list(listeners or [])
        # A signal's handler may come while its own thread writes, and must not wait for it.
        self._one = threading.RLock()

    def __call__(self, event: Event) -> None:
        self.write(Record(time.time(), event))
        for listener in self.listeners:
            listener(event)

    def write(self, record: Record) -> None:
        """Append an event that happened at another time; no listener hears of it."""
        line = {"kind": record.event.kind, "time": round(record.time, 3), **_plain(record.event)}
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        with self._one:
            self._file.write(text)
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_events(folder: Path) -> Iterator[Record]:
    """The events of a run folder in order; lines that are cut, unknown or wrong are passed over."""
    path = folder / FILE_NAME
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


def _parse(line: str) -> Record | None:
    try:
        raw = parse_json(line)
        event_type = EVENTS.get(raw["kind"])
        if event_type is None:
            return None
        known = {f.name for f in dataclasses.fields(event_type)}
        values = {key: _revive(value) for key, value in raw.items() if key in known}
        at = float(raw["time"])
        if not 0 <= at < _LATEST or (_LONG.search(line) and not _counts(list(values.values()))):
            return None
        return Record(at, _checks()[event_type.kind].validate_python(values))
    except (ValueError, TypeError, KeyError, OverflowError):  # pydantic's are ValueErrors
        return None


_LATEST = 1e11  # unix seconds, of the year 5138
_LONG = re.compile("[0-9]{19}")
_LARGEST = 1 << 63


@cache
def _checks() -> dict[str, Any]:
    """What checks that the fields of an event are of its types: others wrote the file, perhaps."""
    from pydantic import TypeAdapter

    return {kind: TypeAdapter(event_type) for kind, event_type in EVENTS.items()}


def _counts(values: list[Any]) -> bool:
    """Whether every whole number in ``values`` is one that something could have been counted to."""
    for value in values:
        if isinstance(value, int) and abs(value) >= _LARGEST:
            return False
        inside = value.values() if isinstance(value, dict) else value
        if isinstance(value, (dict, list)) and not _counts(list(inside)):
            return False
    return True


# JSON has no NaN and no infinity, and a loss can be either.
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(event: Event) -> dict[str, Any]:
    return {key: _number(value) for key, value in dataclasses.asdict(event).items()}


def _number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {
            "number": "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
        }
    return value


def _revive(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"number"}:
        return _NUMBERS[value["number"]]
    return value


def _ends_mid_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"
