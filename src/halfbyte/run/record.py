"""The events of a run on their way: heard at once, on disk once there is something to keep."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from halfbyte.events import Emit, EventLog, Record
from halfbyte.events.types import Event, Heartbeat, Phase, PhaseProgress, PhaseStarted, RunStarted
from halfbyte.redaction import redact_all
from halfbyte.run.heartbeat import EVERY, STARTING, HeartbeatThread, Work

TOLD_EVERY = 0.1  # seconds


class RunRecord:
    """Emits events to the listeners and, from ``open`` on, to the run folder.

    Whatever is wrong with a recipe, its data or its model shows before step 1; until then nothing
    is written, so that a run that never began leaves nothing behind. The events so far are
    written, with their own times, when the folder is opened. A sign of life is written where
    nothing else is for half a minute, until then into a file that goes; ``work`` keeps what it
    says.
    """

    def __init__(self, listeners: Sequence[Emit] = ()) -> None:
        self.listeners = list(listeners)
        self._waiting: list[Record] = []
        self._log: EventLog | None = None
        self.work = Work()
        self._written = time.monotonic()  # when an event last was
        self._heartbeat: HeartbeatThread | None = None
        self._ours: Callable[[], bool] = lambda: True
        self._starting: Path | None = None  # what is written before the folder is opened

    @property
    def opened(self) -> bool:
        return self._log is not None

    def __call__(self, event: Event) -> None:
        event = redact_all(event)
        self.work.mark()
        if self._log is None:
            # What was said while the folder was sought and locked belongs to the process too.
            at = 0 if isinstance(event, RunStarted) else len(self._waiting)
            self._waiting.insert(at, Record(time.time(), event))
            self.tell(event)
        else:
            self._written = time.monotonic()
            self._log(event)

    def tell(self, event: Event) -> None:
        """Let the listeners hear of ``event``, which the record does not keep."""
        for listener in self.listeners:
            listener(event)

    def prepare(self, folder: Path, *, ours: Callable[[], bool] = lambda: True) -> None:
        """Give signs of life in ``folder`` as long as it is ``ours``; those that are given before
        ``open`` go with it, or with ``close``."""
        self._ours = ours
        self._starting = folder / STARTING
        self._written = -EVERY
        self._heartbeat = HeartbeatThread(self.beat)

    def open(self, folder: Path) -> None:
        """Write what has happened so far into ``folder`` and everything else as it happens."""
        log = EventLog(folder)
        for record in self._waiting:
            log.write(record)
        self._waiting.clear()
        log.listeners = self.listeners
        self._log = log
        self._written = time.monotonic()
        if self._heartbeat is None:
            self._heartbeat = HeartbeatThread(self.beat)
        self._remove_starting()

    def beat(self) -> float:
        """Write a sign of life if it is time for one; returns the seconds until it may be again.

        No listener hears of it, since it is not their thread that it comes from.
        """
        left = self._written + EVERY - time.monotonic()
        if left > 0:
            return max(left, 0.1)
        sign = Heartbeat(
            self.work.doing, round(self.work.since(), 1), round(time.process_time(), 1)
        )
        with suppress(OSError, ValueError):  # a full disk is for the work to tell of; or it closed
            if not self._ours():
                pass
            elif self._log is not None:
                self._log.write(Record(time.time(), sign))
            elif self._starting is not None:
                text = json.dumps({"time": round(time.time(), 3), **asdict(sign)})
                self._starting.write_text(text, encoding="utf-8")
        self._written = time.monotonic()
        return EVERY

    def close(self) -> None:
        """Close the file. What a full disk did not take has been told of when it was written."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        self._remove_starting()
        if self._log is not None:
            with suppress(OSError):
                self._log.close()

    def _remove_starting(self) -> None:
        if self._starting is not None:
            with suppress(OSError):
                self._starting.unlink()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tells that a phase begins, and emits how long the body took if it ended well."""
        self.tell(PhaseStarted(name))
        before = self.work.doing
        self.work.mark(name)
        began = time.perf_counter()
        yield
        self(Phase(name, time.perf_counter() - began))
        self.work.mark(before)

    def progress(self, name: str, of: str) -> Callable[[int, int], None]:
        """What tells how many ``of`` how many are done in the phase ``name``, ten times a second
        at most."""
        told = time.perf_counter()

        def tell(done: int, total: int) -> None:
            nonlocal told
            self.work.mark()
            if time.perf_counter() - told >= TOLD_EVERY:
                self.tell(PhaseProgress(name, done, total, of))
                told = time.perf_counter()

        return tell

    @contextmanager
    def timed(self) -> Iterator[Callable[[], float]]:
        """Gives a function that tells the seconds since the body began."""
        began = time.perf_counter()
        yield lambda: time.perf_counter() - began
