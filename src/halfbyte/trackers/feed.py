"""One tracker: a queue that drops the oldest, a thread that empties it, a process that is fed.

The tool runs in a process of its own. It cannot crash the run, take its GPU or hold its
interpreter's lock while it imports and sends; and one that hangs can be ended, with whatever
processes it started.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby
from typing import Any

from halfbyte.events.types import Event
from halfbyte.trackers.messages import Message, message_of

WORKER = (sys.executable, "-P", "-m", "halfbyte.trackers.worker")
QUEUE = 10_000  # events that wait; beyond, the oldest are dropped
PAUSE = 0.5  # seconds between two looks at the queue
LONGEST_REPLY = 20_000  # bytes


class Feed:
    """Tells the tracker ``name`` of events; ``opening`` is the first thing that it is told.

    ``keep`` is called, in another thread, with what the tracker wants to know when the run is
    resumed (its own id of it). ``trouble`` says what went wrong, once the tracker is off.
    """

    def __init__(self, name: str, opening: Message, keep: Callable[[str, Any], None]) -> None:
        self.name = name
        self.trouble: str | None = None
        self._waiting: deque[tuple[float, Event]] = deque(maxlen=QUEUE)
        self._offered = self._taken = 0
        self._keep = keep
        self._end: Message | None = None
        self._wake = threading.Event()
        self._process = subprocess.Popen(
            [*WORKER, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run alone, which tells of the end
        )
        self._feeding = threading.Thread(target=self._feed, args=[opening], daemon=True)
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._feeding.start()
        self._reading.start()

    def offer(self, event: Event, happened: float) -> None:
        """Put ``event`` into the queue; never waits."""
        if self.trouble is None:
            self._offered += 1
            self._waiting.append((happened, event))

    @property
    def dropped(self) -> int:
        """Events that were dropped, since the tracker took them more slowly than they came."""
        return self._offered - self._taken - len(self._waiting)

    def finish(self, end: Message) -> None:
        """Say that the run has ended, as ``end`` tells; ``wait`` waits for the tracker."""
        self._end = end
        self._wake.set()

    def wait(self, until: float) -> None:
        """Wait for the tracker to end until the time ``until`` (``time.monotonic``), then end it
        and every process that it started."""
        self._feeding.join(max(0.0, until - time.monotonic()))
        try:
            status = self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop("had not taken everything in time when the run ended, and was stopped")
            return
        self._reading.join(1.0)  # what it said last
        if status != 0:
            self._fail(f"ended with status {status}")

    def stop(self, why: str) -> None:
        """End the tracker and every process that it started, at once."""
        self._fail(why)
        if self._process.poll() is None:
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _fail(self, why: str) -> None:
        if self.trouble is None:
            self.trouble = why

    def _feed(self, opening: Message) -> None:
        """Write what waits, as lines, until the end is written or the tracker is off."""
        assert self._process.stdin is not None
        try:
            with self._process.stdin as pipe:
                pipe.write(_line(opening))
                pipe.flush()
                while self.trouble is None:
                    self._wake.wait(PAUSE)
                    ending = self._end is not None
                    while messages := self._take():
                        pipe.write(b"".join(map(_line, _grouped(messages))))
                    if ending:
                        pipe.write(_line({"kind": "end", **(self._end or {})}))
                    pipe.flush()
                    if ending:
                        return
        except (OSError, ValueError):  # it is gone: its status or its own words say why
            with suppress(OSError):
                self._process.stdin.close()
            self._note_death()

    def _note_death(self) -> None:
        """Take note of a process that ended by itself while the run goes on."""
        status = self._process.wait()
        self._reading.join(1.0)
        self._fail(f"ended with status {status}")

    def _take(self) -> list[Message]:
        """The messages of what waits, some hundred at a time."""
        found: list[Message] = []
        while self._waiting and len(found) < 500:
            happened, event = self._waiting.popleft()
            self._taken += 1
            message = message_of(event, happened)
            if message is not None:
                found.append(message)
        return found

    def _read(self) -> None:
        """Hear what the tracker says: what to keep, or why it gives up."""
        assert self._process.stdout is not None
        with suppress(OSError, ValueError):
            for _ in range(100):
                line = self._process.stdout.readline(LONGEST_REPLY)
                if not line:
                    return
                said = json.loads(line)
                if "keep" in said:
                    self._keep(self.name, said["keep"])
                if "failed" in said:
                    self._fail(str(said["failed"])[:1_000])


def _grouped(messages: list[Message]) -> Iterator[Message]:
    """Metrics that follow one another as the rows of one message: a tool sends them in one go."""
    for kind, group in groupby(messages, key=lambda message: message["kind"]):
        if kind == "metrics":
            yield {"kind": kind, "rows": list(group)}
        else:
            yield from group


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"
