"""Templates that nobody has looked at, rendered in a process of their own with limits.

A template is a program: one line of it takes all memory there is, or never ends. One worker
(:mod:`halfbyte.data.template_worker`) serves this process, begun when it is first needed. What it
is asked for comes in batches, since a way there and back takes longer than to render a row.
"""

from __future__ import annotations

import atexit
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.data.template_worker import MEMORY, SECONDS, TOO_MUCH
from halfbyte.errors import DataError, HalfbyteError
from halfbyte.foreign_json import parse_json

# What is sent at once. In SECONDS any template renders hundreds of times as much.
BATCH, BATCH_CHARACTERS = 64, 1 << 20
WAITED = 6 * SECONDS  # on a machine with other things to do
MOST_ANSWERED = 1 << 30  # bytes
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")


class TemplateStopped(DataError):
    """A template that was stopped, or stopped its process; ``place`` is of the work it did then."""

    def __init__(self, what: str, place: int, where: str = "") -> None:
        self.what, self.place = what, place
        super().__init__(
            f"{where or 'the template'} {what}, more than any template needs, and was stopped; "
            "use another one."
        )


@dataclass(frozen=True)
class Failed:
    """Why a template made no text: the class of what it raised, its words, its own line."""

    kind: str
    words: str
    line: int | None


class TemplateProcess:
    """The worker: what it renders is a list of results, or of why there is none."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._progress = -1
        self._opened: set[str] = set()
        self._lock = threading.Lock()

    def open(self, key: str, **template: Any) -> Failed | None:
        """Have the worker compile ``template`` under ``key``; why it cannot, where it cannot.

        Raises TemplateStopped.
        """
        with self._lock:
            return self._open(key, template)

    def render(
        self, templates: dict[str, dict[str, Any]], key: Any, work: Sequence[Any]
    ) -> list[Any]:
        """A result, or Failed, for each of ``work`` by the templates of ``key``.

        ``templates`` are those of ``key``, which are compiled again where the worker is a new one.
        Raises TemplateStopped.
        """
        with self._lock:
            for one, template in templates.items():
                self._open(one, template)
            return self._ask("render", key, work)

    def _open(self, key: str, template: dict[str, Any]) -> Failed | None:
        if key in self._opened and self._child is not None and self._child.poll() is None:
            return None
        [found] = self._ask("open", key, template)
        if isinstance(found, Failed):
            return found
        self._opened.add(key)
        return None

    def _ask(self, kind: str, key: Any, work: Any) -> list[Any]:
        child = self._running()
        asked = pickle.dumps((kind, key, work), protocol=5)
        try:
            assert child.stdin is not None
            child.stdin.write(struct.pack("<Q", len(asked)) + asked)
            child.stdin.flush()
            answer = self._read(child)
        except (OSError, EOFError, ValueError) as error:
            raise self._stopped(child, error) from None
        except BaseException:  # Ctrl-C: what is to come would be taken for another's answer
            self.close()
            raise
        found = [self._found(one, place) for place, one in enumerate(answer)]
        self._done()
        return found

    def _found(self, one: Any, place: int) -> Any:
        if one[0] == "made":
            return one[1]
        if one[0] == TOO_MUCH:
            self.close()
            raise TemplateStopped(f"takes more than {MEMORY >> 20} MB of memory", place)
        kind, words, line = one
        return Failed(str(kind), str(words), line)

    def _read(self, child: subprocess.Popen[bytes]) -> list[Any]:
        """The answer. Raises OSError, EOFError and ValueError."""
        assert child.stdout is not None
        until = time.monotonic() + WAITED
        number = child.stdout.fileno()
        [length] = struct.unpack("<Q", b"".join(_bytes(number, 8, until)))
        if length > MOST_ANSWERED:
            raise ValueError("it answers too much")
        answer = parse_json(b"".join(_bytes(number, length, until)))
        if not isinstance(answer, list):
            raise ValueError("it answers something else")
        return answer

    def _stopped(self, child: subprocess.Popen[bytes], error: Exception) -> HalfbyteError:
        """What becomes of the worker that gave no answer, and why it did not."""
        place = self._done()
        if isinstance(error, TimeoutError):
            self.close()
            return TemplateStopped(f"takes more than {WAITED} seconds", place)
        if isinstance(error, ValueError):
            self.close()
            return TemplateStopped("writes more than texts", place)
        try:
            code = child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        began = bool(self._opened) or place
        self.close()
        if code is not None and code > 0 and not began:
            return DataError(
                "the process that renders templates cannot be started (exit code "
                f"{code}); see whether {sys.executable} -m halfbyte.data.template_worker 1 runs."
            )
        if code is not None and -code in (9, 24):  # by its limit of the processor's time
            return TemplateStopped(f"takes more than {SECONDS} seconds", place)
        return TemplateStopped("ends the process that renders it", place)

    def _done(self) -> int:
        """How many parts of the work were done since it was last asked."""
        try:
            return len(os.read(self._progress, 1 << 16))
        except OSError:
            return 0

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        self._progress, theirs = os.pipe()
        os.set_blocking(self._progress, False)
        # -P: nothing is imported from the working directory, which may be a stranger's.
        command = [sys.executable, "-P", "-m", "halfbyte.data.template_worker", str(theirs)]
        try:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                pass_fds=(theirs,),
                start_new_session=True,  # Ctrl-C is for this process
            )
        except OSError as error:
            raise DataError(
                f"the process that renders templates cannot be started ({error.strerror}); free "
                "some memory or processes."
            ) from error
        finally:
            os.close(theirs)
        return self._child

    def close(self) -> None:
        """End the worker; the next work begins another."""
        self._opened.clear()
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                assert pipe is not None
                try:
                    pipe.close()
                except OSError:  # what was still to be written
                    continue
        if self._progress >= 0:
            os.close(self._progress)
            self._progress = -1


def _environment() -> dict[str, str]:
    """What the worker needs of this process's: where things are, and nothing that is secret."""
    found = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    # Where halfbyte was imported from, in case that is a path this process alone looks in.
    paths = [found.get("PYTHONPATH"), str(Path(__file__).resolve().parents[2])]
    return {**found, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _bytes(number: int, count: int, until: float) -> Iterator[bytes]:
    """``count`` bytes of a pipe. Raises EOFError where it ends, TimeoutError after ``until``."""
    waiting = select.poll()
    waiting.register(number, select.POLLIN)
    while count:
        left = until - time.monotonic()
        if left <= 0 or not waiting.poll(1000 * left):
            raise TimeoutError
        found = os.read(number, min(count, 1 << 20))
        if not found:
            raise EOFError
        count -= len(found)
        yield found


_process = TemplateProcess()
_owner = os.getpid()


def template_process() -> TemplateProcess:
    """The one of this process."""
    global _process, _owner
    if _owner != os.getpid():  # a fork has pipes of its parent's worker, which it must not use
        _process, _owner = TemplateProcess(), os.getpid()
    return _process


@atexit.register
def _close() -> None:
    if _owner == os.getpid():
        _process.close()
