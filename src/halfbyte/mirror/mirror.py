"""Finished checkpoints, copied elsewhere while the run goes on.

A thread copies the newest checkpoint; an older one that still waits is dropped. Whatever goes
wrong there is told of and tried again, and never ends the run. What a mirror holds of a run is laid
out as the run folder is: ``checkpoints/step-N``, at the end the adapter, the report, the recipe.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.checkpoint.manifest import check_manifest
from halfbyte.errors import RunError
from halfbyte.events import Emit
from halfbyte.events.types import Event, Mirrored, Warned
from halfbyte.mirror.folder_target import FolderTarget
from halfbyte.mirror.hub_target import SCHEME, HubTarget
from halfbyte.mirror.target import MirrorError, Target, step_of

PAUSES = (10.0, 30.0, 60.0, 180.0, 600.0)  # seconds before a checkpoint that failed is tried again
ANSWER_SECONDS = 30.0  # in which a mirror must answer when the run begins
END_SECONDS = 600.0  # that the end of a run waits for its mirror at most


@dataclass(frozen=True)
class _Job:
    """A checkpoint, with the steps that are to stay; or, without one, the results in ``folder``."""

    folder: Path
    step: int | None
    keep: frozenset[int] = frozenset()

    @property
    def words(self) -> str:
        return "the adapter and the report" if self.step is None else self.folder.name


class Mirror:
    """A run's place in a mirror, which ``open`` gives.

    ``send`` and ``in_use`` return at once; ``tell`` emits what has happened since, in the caller's
    thread; ``finish`` waits, for a bounded time.
    """

    def __init__(
        self, target: Target, run_id: str | None, emit: Emit, *, pauses: Sequence[float] = PAUSES
    ) -> None:
        self.words = target.words
        self.run_id = run_id
        self._target = target
        self._emit = emit
        self._pauses = pauses
        self._identified = False
        self._changed = threading.Condition()
        # All below is read and written under ``_changed``.
        self._events: list[Event] = []
        self._kinds: set[str] = set()  # of failures that were told of
        self._waiting: _Job | None = None
        self._results: _Job | None = None
        self._working: _Job | None = None
        self._failed = 0  # times in a row
        self._try_at = 0.0  # monotonic
        self._moved_at = 0.0  # monotonic: the last sign of progress
        self._ending = self._last_try = False
        self._missing: list[_Job] = []
        self._thread: threading.Thread | None = None

    @classmethod
    def open(
        cls,
        where: str,
        folder: Path,
        run_id: str | None,
        emit: Emit,
        *,
        must_answer: bool,
        name: str | None = None,
        answer_seconds: float = ANSWER_SECONDS,
        pauses: Sequence[float] = PAUSES,
    ) -> Mirror:
        """The mirror at ``where`` (a folder, or ``hf://owner/repo``) of the run in ``folder``.

        It is there under ``name``, by default the run folder's own. Without a ``run_id`` it is
        that of whatever run is there, None where none is, and nothing is made.

        Raises RunError where ``where`` cannot be a mirror, where another run of that name is there
        and, with ``must_answer``, where it cannot be reached; without, that is emitted and tried
        again later.
        """
        run = name or folder.resolve().name
        mirror: Mirror | None = None

        def moved() -> None:
            if mirror is not None:
                mirror._move()

        target = _target(where, run, folder, moved)
        mirror = cls(target, run_id, emit, pauses=pauses)
        try:
            mirror._identify_within(answer_seconds)
        except MirrorError as error:
            if must_answer:
                raise RunError(f"the mirror {mirror.words} cannot be used: {error}.") from error
            mirror._note(error)
        if isinstance(target, HubTarget) and target.public:
            emit(Warned(f"{mirror.words} is open to all: whoever likes can read the checkpoints"))
        mirror.tell()
        return mirror

    def send(self, checkpoint: Path, keep: Collection[int]) -> None:
        """Have the folder ``checkpoint`` copied, in place of one that waits; once it is there, of
        the others only the steps ``keep`` stay."""
        step = step_of(checkpoint.name)
        with self._changed:
            self._waiting = _Job(checkpoint, step, frozenset(keep))
            self._try_at = 0.0
            self._begin()
            self._changed.notify_all()

    def in_use(self) -> set[int]:
        """Steps whose folders are still to be read."""
        with self._changed:
            jobs = (self._working, self._waiting)
            return {job.step for job in jobs if job is not None and job.step is not None}

    def tell(self) -> None:
        """Emit what happened since the last call."""
        with self._changed:
            events, self._events = self._events, []
        for event in events:
            self._emit(event)

    def finish(self, folder: Path | None, wait: float = END_SECONDS) -> None:
        """Copy what still waits, and of a run that has ended what it made in ``folder``.

        Waits so many seconds at most, and less where nothing moves; emits what is not there then.
        """
        with self._changed:
            self._results = None if folder is None else _Job(folder, None)
            self._ending = True
            self._begin()
            self._moved_at = time.monotonic()
            self._changed.notify_all()
        end = time.monotonic() + wait
        assert self._thread is not None
        while self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(0.1)
            with self._changed:
                if time.monotonic() - self._moved_at > self._target.patience:
                    break
        if self._thread.is_alive():
            self._target.give_up()
        with self._changed:
            late = (self._working, self._waiting, self._results)
            missing = [*self._missing, *(job for job in late if job is not None)]
            if missing:
                names = " and ".join(job.words for job in missing)
                text = f"not in the mirror {self.words}: {names}; copy it from the run folder"
                self._events.append(Warned(text))
            self._waiting = self._results = None
        self.tell()

    def newest(self, into: Path, after: int = -1) -> Path | None:
        """The newest whole checkpoint of the mirror, as ``into/step-N``; None where there is none
        of a step later than ``after``.

        One that is damaged is passed over, with a warning. Raises RunError where the mirror cannot
        be read.
        """
        try:
            for step in reversed([step for step in self._target.steps() if step > after]):
                found = self._fetched(step, into)
                if found is not None:
                    return found
        except MirrorError as error:
            raise RunError(f"the mirror {self.words} cannot be read: {error}.") from error
        return None

    def _fetched(self, step: int, into: Path) -> Path | None:
        final, partial = into / f"step-{step}", into / f".step-{step}.partial"
        try:
            into.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            raise RunError(f"{into} cannot be written ({error.strerror}).") from error
        try:
            self._target.fetch(step, partial)
            check_manifest(partial)
        except RunError:
            shutil.rmtree(partial, ignore_errors=True)
            text = f"step-{step} in the mirror {self.words} is not whole: an earlier one is taken"
            self._emit(Warned(text))
            return None
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, MirrorError) and error.kind == "full":  # the disk here
                raise RunError(f"the disk of {into} is full; free some space.") from error
            raise
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        return final

    def _identify(self) -> None:
        """Raises RunError where the mirror holds another run of this name, MirrorError where it
        cannot be reached."""
        found = self._target.open(make=self.run_id is not None)
        if self.run_id is None:
            self.run_id = found
        elif found and found != self.run_id and not self._target.steps():
            # That run was lost before it had a checkpoint here, and can never come back for it.
            self._target.take(self.run_id)
        elif found is not None and found != self.run_id:
            what = f"another run ({found[:8]})" if found else "something else"
            raise RunError(
                f"the mirror {self.words} holds {what} under the name of this run; choose another "
                "--mirror, or another name for the run folder."
            )
        self._identified = True

    def _identify_within(self, seconds: float) -> None:
        """As ``_identify``, for a mirror that may never answer."""
        ended: list[Exception | None] = []

        def ask() -> None:
            try:
                self._identify()
                ended.append(None)
            except Exception as error:
                ended.append(error)

        thread = threading.Thread(target=ask, name="mirror", daemon=True)
        thread.start()
        thread.join(seconds)
        if not ended:
            raise MirrorError("hangs", f"no answer in {seconds:.0f} seconds; see whether it works")
        if ended[0] is not None:
            raise ended[0]

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            began = time.monotonic()
            error: MirrorError | None = None
            try:
                self._do(job)
            except MirrorError as found:
                error = found
            except Exception as found:  # whatever it is, the run must not end of it
                error = MirrorError("other", f"{type(found).__name__}: {found}")
            there = job.folder.exists()
            with self._changed:
                self._working = None
                if there:
                    self._end(job, error, time.monotonic() - began)
                # Else the run removed it before it was known to be in use, and a newer one comes.

    def _do(self, job: _Job) -> None:
        if not self._identified:
            try:
                self._identify()
            except RunError as error:
                raise MirrorError("another run", str(error).rstrip(".")) from error
        if job.step is None:
            self._target.put_results(job.folder, self.run_id or "")
        else:
            self._target.put(job.folder, self.run_id or "", job.keep)

    def _next(self) -> _Job | None:
        with self._changed:
            while True:
                job = self._waiting
                pause = self._try_at - time.monotonic()
                if job is not None and (pause <= 0 or self._ending):
                    self._waiting = None
                elif job is None and self._results is not None:
                    job, self._results = self._results, None
                elif job is None and self._ending:
                    return None
                else:
                    self._changed.wait(None if job is None else pause)
                    continue
                self._working = job
                self._moved_at = time.monotonic()
                # What is tried at the end is tried for the last time.
                self._last_try = self._ending
                return job

    def _end(self, job: _Job, error: MirrorError | None, seconds: float) -> None:
        if error is None:
            self._failed = 0
            self._events.append(Mirrored(job.step, self.words, seconds))
        else:
            self._note(error)
            pause = self._pauses[min(self._failed, len(self._pauses) - 1)]
            self._failed += 1
            if self._last_try:
                self._missing.append(job)
            elif self._waiting is None:
                self._waiting = job
                self._try_at = time.monotonic() + pause
        self._changed.notify_all()

    def _note(self, error: MirrorError) -> None:
        if error.kind not in self._kinds and error.kind != "ended":
            self._kinds.add(error.kind)
            text = f"the mirror {self.words} does not take copies: {error}; it is tried again"
            self._events.append(Warned(text))

    def _move(self) -> None:
        with self._changed:
            self._moved_at = time.monotonic()


def names_in(where: str) -> list[str]:
    """The names of the runs that the mirror at ``where`` holds. Raises RunError."""
    try:
        return _target(where, "run", None, lambda: None).names()
    except MirrorError as error:
        raise RunError(f"the mirror {where} cannot be read: {error}.") from error


def _target(where: str, run: str, folder: Path | None, progress: Callable[[], None]) -> Target:
    if where.startswith(SCHEME):
        return HubTarget(where, run)
    if "://" in where:
        raise RunError(f"the mirror {where} is neither a folder nor {SCHEME}owner/repo.")
    target = FolderTarget(Path(where).expanduser().absolute(), run, progress)
    if folder is None:
        return target
    here, there = folder.resolve(), target.folder.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise RunError(
            f"the mirror {where} would lie in the run folder {folder} itself; choose a folder "
            "elsewhere, on another disk if there is one."
        )
    return target
