"""Checkpoints written by a thread of their own, while the steps go on.

Copying the state aside is all that a step waits for; serializing, hashing and waiting for the disk
happen beside the next ones. One checkpoint is written at a time: where the disk is so slow that the
next is due before the last is there, the run waits, and how long it did is counted.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from halfbyte.checkpoint.files import prune_checkpoints, save_checkpoint
from halfbyte.checkpoint.snapshot import Snapshot
from halfbyte.checkpoint.state import CheckpointState

# A disk that is gone may hold the thread for ever.
CLOSING_SECONDS = 30.0


@dataclass(frozen=True)
class Written:
    """A checkpoint that is whole on the disk, and the seconds that writing it took."""

    path: Path
    state: CheckpointState
    seconds: float


class CheckpointWriter:
    """Writes into ``folder`` and keeps the last ``keep_last`` checkpoints there, and the best.

    All methods are called by the run's own thread. What goes wrong in the other one is raised by
    the next call of any of them.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder, self.keep_last = folder, keep_last
        self.waited = 0.0  # seconds that the run stood still for a checkpoint being written
        # Steps whose folders somebody reads: they stay a while longer.
        self.spare: Callable[[], Collection[int]] = tuple
        self._thread: threading.Thread | None = None
        self._written: deque[Written] = deque()
        self._error: BaseException | None = None

    def submit(self, snapshot: Snapshot) -> None:
        """Begin to write ``snapshot``, once the one before it is written."""
        self.wait()
        # As a daemon it does not keep a process alive that was told twice to stop.
        self._thread = threading.Thread(
            target=self._write, args=(snapshot,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def poll(self) -> list[Written]:
        """What has been written since the last call."""
        self._raise()
        found = []
        while self._written:
            found.append(self._written.popleft())
        return found

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            began = time.perf_counter()
            self._thread.join()
            self.waited += time.perf_counter() - began
            self._thread = None
        self._raise()

    def close(self) -> None:
        """Leave the folder alone from now on: return once nothing is written, or after a while.

        For a run that ends by an error of its own; what went wrong here is of no account then.
        """
        if self._thread is not None:
            self._thread.join(timeout=CLOSING_SECONDS)

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        began = time.perf_counter()
        try:
            path = save_checkpoint(self.folder, snapshot)
            self._written.append(Written(path, snapshot.state, time.perf_counter() - began))
            best = snapshot.state.best_step
            prune_checkpoints(self.folder, self.keep_last, best, self.spare())
        except BaseException as error:
            self._error = error
