"""One process on a run folder: the file ``run.lock`` in it.

Only what every file system has is used: a file is made where none was (``O_EXCL``), and renamed.
Locks of the kernel (``flock``) die with their process, but some network disks ignore them or keep
them to one machine.

A lock that a crash left behind is taken over in one rename. Whoever wants to first makes
``run.lock.next``, which only one can, looks whether ``run.lock`` is still the dead one, and renames
the one onto the other; ``run.lock.next`` is itself a lock that can be taken over like that.

No clock is read, since wall clocks jump and differ between machines: a holder that cannot be asked
is dead when it has not counted up in as many looks as six of its beats take.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from halfbyte.errors import RunError
from halfbyte.run.lock_holder import (
    RECORD_BYTES,
    Holder,
    Verdict,
    decoded,
    judge,
    this_process,
)

FILE_NAME = "run.lock"
BEAT = 5.0  # seconds
MISSED = 6  # beats after which a holder that cannot be asked is dead
_LOOKS = 4  # at a holder, in one of its beats
_LONGEST_BEAT = 60.0  # a damaged record must not be waited for longer
_NEXT_WAIT = 0.05  # seconds between two tries for ``run.lock.next``, which is held for an instant
_BINARY = getattr(os, "O_BINARY", 0)


class RunLock:
    """A context in which no other process works on ``folder``, which exists.

    ``tell`` is called with a sentence where the user should know of something: a lock is watched,
    or taken over. ``lost`` is a sentence once the lock was taken from this process; nothing may be
    written into the folder from then on. Raises RunError where another process holds the folder or
    no lock can be written there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tell: Callable[[str], None] = lambda text: None,
        beat: float = BEAT,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.folder = folder
        self.path = folder / FILE_NAME
        self.lost: str | None = None
        self._tell = tell
        self._sleep = sleep
        self._mine = this_process(secrets.token_hex(16), beat)
        self._ended = threading.Event()
        self._file = threading.Lock()  # the heartbeat and ``check`` both open it
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        try:
            self._take(self.path)
        except OSError as error:
            raise RunError(
                f"the run folder {self.folder} cannot be locked for this run "
                f"({error.strerror or error}); mend that or choose another --out."
            ) from error
        except BaseException:
            _remove(self.path, self._mine.token)  # stopped in the instant after it was taken
            raise
        self._thread = threading.Thread(target=self._count_up, name="run lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if os.getpid() != self._mine.pid:
            return  # a fork of the holder
        if self._thread is not None:
            self._thread.join(timeout=1.0)  # a dead network disk may hold it for ever
        _remove(self.path, self._mine.token)

    def check(self) -> None:
        """Look at the file, as before something is written that another process must not meet.

        Raises RunError where the lock is no longer this process's.
        """
        self._look(count=False)
        if self.lost is not None:
            raise RunError(self.lost)

    def _take(self, path: Path) -> None:
        """Put this process's record at ``path``; raises RunError where a living one holds it."""
        waited = 0.0
        while not _create(path, self._mine.encoded()):
            raw = _read(path)
            if raw is None:
                continue  # released since
            holder = decoded(raw)
            verdict = Verdict.UNKNOWN if holder is None else judge(holder, self._mine)
            if verdict is Verdict.UNKNOWN:
                known = self._watch(path, raw, holder)
                if known is None:
                    continue
                verdict = known
            if verdict is Verdict.LIVING:
                if path == self.path or waited > MISSED * BEAT:
                    raise RunError(self._refusal(holder))
                self._sleep(_NEXT_WAIT)
                waited += _NEXT_WAIT
                continue
            following = path.with_name(path.name + ".next")
            self._take(following)
            try:
                if _read(path) != raw:
                    continue  # somebody else took it over
                if path == self.path:
                    self._tell(self._taking_over(holder))
                _rename(following, path)
                return
            finally:
                _remove(following, self._mine.token)

    def _watch(self, path: Path, raw: bytes, holder: Holder | None) -> Verdict | None:
        """Whether a holder that cannot be asked counts up; None where there is another one now."""
        beat = self._mine.beat if holder is None else min(max(holder.beat, 0.01), _LONGEST_BEAT)
        if path == self.path:
            who = "its record is damaged" if holder is None else f"{holder.words} made it"
            self._tell(
                f"{self.path} is there ({who}, and cannot be asked from here): looking for "
                f"{beat * MISSED:.0f} seconds whether it is still in use."
            )
        for _ in range(math.ceil(MISSED * _LOOKS)):
            self._sleep(beat / _LOOKS)
            now = _read(path)
            if now == raw:
                continue
            found = None if now is None else decoded(now)
            same = found is not None and holder is not None and found.token == holder.token
            return Verdict.LIVING if same else None
        return Verdict.DEAD

    def _refusal(self, holder: Holder | None) -> str:
        if holder is not None and holder.pid == self._mine.pid and holder.host == self._mine.host:
            return (
                f"{self.folder} is in use by another run of this very process ({holder.words}); "
                "let it end, or choose another --out."
            )
        who = "another process" if holder is None else holder.words
        return (
            f"{self.folder} is in use: {who} trains there; let it end or stop it, or choose "
            "another --out."
        )

    def _taking_over(self, holder: Holder | None) -> str:
        who = "whoever made it" if holder is None else holder.words
        return (
            f"{self.path} was left behind ({who} is gone without releasing it): taken over by "
            "this process."
        )

    def _count_up(self) -> None:
        while self.lost is None and not self._ended.wait(self._mine.beat):
            self._look(count=True)

    def _look(self, *, count: bool) -> None:
        """See whether the lock is still ours, and with ``count`` show that we live."""
        with self._file:
            try:
                # One open file for both: where another one is renamed here in between, the count
                # goes into the old one, which nobody sees.
                fd = os.open(self.path, (os.O_RDWR if count else os.O_RDONLY) | _BINARY)
            except (FileNotFoundError, NotADirectoryError):
                self._lose("it is no longer there")
                return
            except OSError:
                return  # a disk that does not answer says nothing of who holds the lock
            try:
                found = decoded(os.read(fd, RECORD_BYTES))
                if found is None or found.token != self._mine.token:
                    who = "it was overwritten" if found is None else f"{found.words} has it"
                    self._lose(who)
                elif count and not self._ended.is_set():
                    self._mine = replace(self._mine, count=self._mine.count + 1)
                    os.lseek(fd, 0, os.SEEK_SET)
                    os.write(fd, self._mine.encoded())
            except OSError:
                pass  # as above, or a full disk
            finally:
                with suppress(OSError):
                    os.close(fd)

    def _lose(self, why: str) -> None:
        self.lost = (
            f"the lock {self.path} was taken from this run ({why}), so it has stopped writing; see "
            "whether another process trains there, and go on with --resume if none does."
        )


def _create(path: Path, record: bytes) -> bool:
    """Make ``path``; False where it is there already."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _BINARY, 0o644)
    except FileExistsError:
        return False
    try:
        try:
            if os.write(fd, record) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    return True


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise
        return None


def _remove(path: Path, token: str) -> None:
    """Remove a lock that holds ``token``; another one stays."""
    with suppress(OSError):
        found = decoded(path.read_bytes())
        if found is not None and found.token == token:
            path.unlink()


def _rename(source: Path, target: Path) -> None:
    for attempt in range(20):
        try:
            source.replace(target)
            return
        except PermissionError:  # Windows, while somebody reads it
            if attempt == 19:
                raise
            time.sleep(0.05)
