"""The process that a tracker runs in: ``python -m halfbyte.trackers.worker NAME``.

Lines of JSON come on standard input: how the run opens, its metrics and texts, its end. Standard
output says what to keep for a resume, and why the tracker gives up. Where the input ends without
an end, the run's process has died, and that is told as well.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import IO, Any, Protocol

LOST = "lost"
MODULES = {"tensorboard", "wandb", "mlflow", "webhook"}


class Tracker(Protocol):
    """What each tool is behind: ``halfbyte.trackers.to_NAME.open_tracker`` makes one."""

    def metrics(self, rows: list[dict[str, Any]]) -> None:
        """Log rows of ``step``, ``time`` (unix seconds) and ``metrics`` (name: number)."""

    def text(self, step: int, time: float, text: str) -> None:
        """Put a warning where the tool has a place for it."""

    def back(self, step: int, time: float) -> None:
        """What came after ``step`` is done again."""

    def end(self, message: dict[str, Any]) -> None:
        """The run is over; ``message`` is what ``outcome.Outcome.message`` gives."""


def main(name: str) -> int:
    commands, replies = _own_streams()
    try:
        opening = json.loads(commands.readline())
        if name not in MODULES:
            raise ValueError(f"no tracker is called {name}")
        module = import_module(f"halfbyte.trackers.to_{name}")
        tracker, kept = module.open_tracker(opening)
        if kept is not None:
            _say(replies, {"keep": kept})
        _follow(tracker, _lines(commands), opening["run"])
    except BaseException as error:
        _say(replies, {"failed": f"failed ({type(error).__name__}: {_first_line(error)})"})
        _leave(1)
    return 0


def _follow(tracker: Tracker, messages: Iterator[dict[str, Any]], run: str) -> None:
    for message in messages:
        match message["kind"]:
            case "metrics":
                tracker.metrics(message["rows"])
            case "text":
                tracker.text(message["step"], message["time"], message["text"])
            case "back":
                tracker.back(message["step"], message["time"])
            case "end":
                tracker.end(message)
                return
    tracker.end({"outcome": LOST, "run": run, "text": f"halfbyte run {run}: its process died"})


def _lines(commands: IO[str]) -> Iterator[dict[str, Any]]:
    for line in commands:
        yield json.loads(line)


def _own_streams() -> tuple[IO[str], IO[str]]:
    """The pipes to the run, and nothing in their place for the tool to read or to write into."""
    # A scheduler signals every process of a job; the run's own tells of its end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    return commands, replies


def _say(replies: IO[str], message: dict[str, Any]) -> None:
    try:
        replies.write(json.dumps(message) + "\n")
        replies.flush()
    except OSError:  # nobody is left who would hear it
        pass


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")


def _leave(status: int) -> None:
    """End at once: a tool that failed may wait for its server in what it does at exit."""
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
