"""Where a mirror is: what a folder and a repository of the hub have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from halfbyte.checkpoint.manifest import NAME as MANIFEST

IDENTITY = "mirror.json"  # which run a folder of the mirror is of
CHECKPOINTS = "checkpoints"
# What of a run folder goes there when the run has ended.
RESULTS = (
    "adapter",
    "plots",
    "report.md",
    "report.html",
    "report.pdf",
    "recipe.yaml",
    "events.jsonl",
)


class MirrorError(Exception):
    """A mirror did not do what it was asked.

    ``kind`` tells failures apart ("full", "network", …), ``str(error)`` is a clause that says what
    is wrong and what to do, without its full stop.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Target(Protocol):
    """One run's place in a mirror. Everything but ``give_up`` may take long, and raises
    MirrorError."""

    words: str  # as the user knows it
    patience: float  # seconds without any progress after which it is taken to hang

    def open(self, *, make: bool) -> str | None:
        """The id of the run that is there; None where none is. ``make``: be ready for one."""

    def take(self, run_id: str) -> None:
        """Let the place be this run's, where another one was that has nothing whole there."""

    def names(self) -> list[str]:
        """The names of all runs that the mirror holds, this one among them if it is there."""

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are whole there, ascending."""

    def put(self, checkpoint: Path, run_id: str, keep: Collection[int]) -> None:
        """Copy the folder ``checkpoint``; once it is whole there, remove the steps not in
        ``keep``."""

    def put_results(self, folder: Path, run_id: str) -> None:
        """Copy what there is of ``RESULTS`` in the run's ``folder``."""

    def fetch(self, step: int, into: Path) -> None:
        """Copy the checkpoint of ``step`` into the empty folder ``into``; nothing is checked."""

    def give_up(self) -> None:
        """End what is under way, as far as that can be done."""


Progress = Callable[[], None]


def step_of(name: str) -> int | None:
    """The step of a checkpoint folder's ``name``; None for any other name."""
    digits = name.removeprefix("step-")
    return int(digits) if digits != name and digits.isascii() and digits.isdigit() else None


def files_of(folder: Path) -> list[str]:
    """The files of a checkpoint folder relative to it, its manifest last; no links."""
    found = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    return sorted(names, key=lambda name: name == MANIFEST)


def identity_text(run_id: str) -> str:
    """What ``IDENTITY`` holds for a run."""
    return json.dumps({"format": 1, "run_id": run_id}) + "\n"


def identity_of(text: str) -> str | None:
    """The run id in the text of ``IDENTITY``; None where it is damaged."""
    try:
        raw: Any = json.loads(text)
        return raw["run_id"] if isinstance(raw["run_id"], str) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
