"""The trackers of a run, as a listener of its events."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.events import Emit
from halfbyte.events.types import (
    Evaluated,
    Event,
    Fallback,
    Finished,
    Noticed,
    PhaseStarted,
    RolledBack,
    RunStarted,
    Step,
    TrainingStarted,
    Warned,
)
from halfbyte.recipe.schema import RecipeFields
from halfbyte.recipe.settings import get, settings
from halfbyte.redaction import redact_all
from halfbyte.trackers.choose import choose
from halfbyte.trackers.feed import Feed
from halfbyte.trackers.messages import FAILED, INTERRUPTED, ends
from halfbyte.trackers.outcome import Outcome

FILE_NAME = "trackers.json"
END_SECONDS = 30.0  # that all trackers together have to send what is left
STOP_SECONDS = 3.0  # the same where Ctrl-C ends the process at once

_TOLD = (Step, Evaluated, Warned, Noticed, Fallback, RolledBack)


class Trackers:
    """Tells the trackers that a recipe asks for of the run's events.

    Made before step 1, when it raises RecipeError for a tracker that cannot be had; after that
    nothing of a tracker stops a run: one that fails is off, and ``record`` gets a Warned event
    that says so, in the thread that calls this object; ``tell`` hears that it waits for them. Use
    it as a context manager around the run, so that an exception is told of as well.

    What a step costs the thread that trains is to be put into queues, measured on a core of an AMD
    EPYC: 0.9 microseconds for one tracker, 1.4 for three. Making a line of it takes 6 more, in
    another thread.
    """

    def __init__(
        self, recipe: RecipeFields, record: Emit, *, tell: Emit = lambda event: None
    ) -> None:
        self._record, self._tell = record, tell
        self.chosen = choose(recipe.trackers)
        self._feeds: list[Feed] = []
        self._before: list[Event] = []
        self._outcome = Outcome()
        self._ended = not self.chosen
        self._kept: dict[str, Any] = {}
        self._folder: Path | None = None
        self._lock = threading.Lock()
        self._told_of: set[str] = set()

    def begin(self, recipe: RecipeFields, folder: Path) -> None:
        """Start the trackers of the run in ``folder``, which ``recipe`` (the effective one) makes.

        They hear now of what was said before.
        """
        if self._ended:
            return
        self._folder = folder
        self._kept = _read_kept(folder / FILE_NAME)
        opening = {
            "run": folder.resolve().name,
            "folder": str(folder.resolve()),
            "config": redact_all({"halfbyte": halfbyte.__version__, **flat(recipe)}),
            "done": self._outcome.resumed_from,
        }
        self._outcome.run = folder.resolve().name
        for tracker in self.chosen:
            kept = self._kept.get(tracker.name)
            message = {**opening, "target": tracker.target, "kept": kept}
            try:
                self._feeds.append(Feed(tracker.name, message, self._keep))
            except OSError as error:
                self._warn(f"trackers.{tracker.name} is off: it could not start ({error.strerror})")
        for event in self._before:
            self._offer(event)
        self._before.clear()

    def __call__(self, event: Event) -> None:
        if self._ended:
            return
        if isinstance(event, _TOLD):
            self._offer(event)
            self._outcome.note(event)
            self._tell_of_trouble()
        elif isinstance(event, RunStarted | TrainingStarted | Finished):
            self._outcome.note(event)
        end = ends(event)
        if end is not None:
            self._end(*end, END_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ended:
            return
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._end(INTERRUPTED, "at once", STOP_SECONDS)
        elif error is None:
            self._end(FAILED, "", END_SECONDS)
        else:
            said = "" if isinstance(error, HalfbyteError) else f"{type(error).__name__}: "
            self._end(FAILED, f"{said}{error}", END_SECONDS)

    def _offer(self, event: Event) -> None:
        if self._folder is None:
            self._before.append(event)
            return
        now = time.time()
        for feed in self._feeds:
            feed.offer(event, now)

    def _end(self, outcome: str, reason: str, seconds: float) -> None:
        self._ended = True
        message = redact_all(self._outcome.message(outcome, reason))
        for feed in self._feeds:
            feed.finish(message)
        until = time.monotonic() + seconds
        if self._feeds:
            self._tell(PhaseStarted("trackers"))
        try:
            for feed in self._feeds:
                feed.wait(until)
        except KeyboardInterrupt:  # the run is over: only the waiting is given up
            for feed in self._feeds:
                feed.stop("was stopped by Ctrl-C before it had taken everything")
        if self._feeds:
            self._tell(PhaseStarted("report"))  # which follows however the run ended
        self._tell_of_trouble()
        for feed in self._feeds:
            if feed.dropped:
                self._warn(
                    f"trackers.{feed.name} missed {feed.dropped:,} events, since it took them more "
                    "slowly than they came: the oldest were dropped"
                )

    def _tell_of_trouble(self) -> None:
        for feed in self._feeds:
            if feed.trouble is not None and feed.name not in self._told_of:
                self._told_of.add(feed.name)
                self._warn(f"trackers.{feed.name} is off: it {feed.trouble}")

    def _warn(self, text: str) -> None:
        with suppress(OSError):  # a full disk is for the run's own events to tell of
            self._record(Warned(text))

    def _keep(self, name: str, value: Any) -> None:
        """Write what a tracker wants to know after a resume into the run's ``trackers.json``."""
        assert self._folder is not None
        path = self._folder / FILE_NAME
        with self._lock, suppress(OSError):
            self._kept[name] = redact_all(value)
            partial = path.with_name(f".{FILE_NAME}.partial")
            partial.write_text(json.dumps(self._kept, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)


def flat(recipe: RecipeFields) -> dict[str, Any]:
    """The settings of ``recipe`` by their dotted keys, those that are empty left out."""
    found = {key: get(recipe, key) for key in settings()}
    return {key: _plain(value) for key, value in found.items() if value not in (None, [], {})}


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_plain(inside) for inside in value]
    return value.model_dump(exclude_defaults=True)


def _read_kept(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
