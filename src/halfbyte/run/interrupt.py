"""Ctrl-C once ends the run after the step it is in; twice, at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType


class StopRequest:
    """A context in which SIGINT only asks: ``requested`` tells the loop to end after its step.

    ``tell`` is called with the signal's name when it comes, inside the handler.
    """

    def __init__(self, tell: Callable[[str], None] = lambda name: None) -> None:
        self.requested = False
        self.name = ""
        self._tell = tell
        self._before: object = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.name = signal.Signals(number).name
        # The signal may have come while the same stream was being written, and then it refuses.
        with suppress(RuntimeError):
            self._tell(self.name)
