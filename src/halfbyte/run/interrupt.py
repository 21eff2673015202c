"""Ctrl-C once ends the run after the step it is in; twice, at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType


class StopRequest:
    """A context in which SIGINT only asks: ``requested`` tells the loop to end after its step."""

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.requested = False
        self.name = ""
        self._say = say
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
        self._say("finishing this step, then saving a checkpoint; press Ctrl-C again to stop now")
