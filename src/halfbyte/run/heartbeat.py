"""A sign of life in the record while nothing else is written there.

A step, an evaluation or the saving of a large adapter can take minutes, and then nothing tells a
slow run from one that hangs. The sign comes from a thread of its own, which lives on while the work
hangs; what it says is therefore for how long the work has got no further.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

EVERY = 30.0  # seconds
# Where the sign is while there is no record yet: rows are prepared, the model is read.
STARTING = "run.starting"


class Work:
    """How far the work is: what it is doing, and when it last got further."""

    def __init__(self) -> None:
        self.doing = "starting"
        self._marked = time.monotonic()

    def mark(self, doing: str | None = None) -> None:
        """The work got further, with ``doing`` from now on if that is another thing."""
        if doing is not None:
            self.doing = doing
        self._marked = time.monotonic()

    def since(self) -> float:
        """Seconds since the last mark."""
        return time.monotonic() - self._marked


class HeartbeatThread:
    """Calls ``beat`` from a thread until ``stop``: at once, and then whenever as many seconds have
    passed as it has returned."""

    def __init__(self, beat: Callable[[], float]) -> None:
        self._beat = beat
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(timeout=1.0)  # a disk that does not answer may hold it for ever

    def _run(self) -> None:
        while not self._ended.wait(self._beat()):
            pass
