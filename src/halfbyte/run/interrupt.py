"""A signal ends the run after the step it is in, with a checkpoint; a second one, at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

# Ctrl-C; what a scheduler sends before it takes the machine; a terminal that was closed.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def exit_code(name: str) -> int:
    """What a process that the signal ``name`` ended exits with, as shells have it: 143."""
    return 128 + int(signal.Signals[name])


class StopRequest:
    """A context in which a signal ends the run in good order.

    While ``stepping`` is set a signal only asks: ``requested`` tells the loop to end after its
    step, ``name`` which one it was, and ``tell`` is called with it inside the handler. A second
    one, or one outside the steps, raises KeyboardInterrupt (SIGINT) or SystemExit, so that what the
    run holds is let go. Outside the main thread, and where somebody else handles a signal already,
    it is left alone.
    """

    def __init__(self, tell: Callable[[str], None] = lambda name: None) -> None:
        self.stepping = False
        self.requested = False
        self.name = ""
        self._tell = tell
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)  # Windows has fewer
                if number is None:
                    continue
                # nohup has SIGHUP ignored, and means it; that a shell has SIGINT ignored in what it
                # starts in the background is of no account to whoever sends one.
                usual = [signal.SIG_DFL, signal.default_int_handler]
                usual += [signal.SIG_IGN] if name == "SIGINT" else []
                if signal.getsignal(number) in usual:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested or not self.stepping:
            raise KeyboardInterrupt if name == "SIGINT" else SystemExit(exit_code(name))
        self.requested = True
        self.name = name
        # The signal may have come while the same stream was being written, and then it refuses.
        with suppress(RuntimeError):
            self._tell(name)
