"""Faults put into a process from outside: calls of the system that fail, or at which it dies.

All that a run does to the disk goes through a few functions of ``os`` and ``io``, and through
safetensors, which writes from Rust. They are wrapped and counted; at one of them, by its number,
something happens.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("rename", "replace", "mkdir", "rmdir", "unlink", "fsync", "sendfile", "copy_file_range")


def inject(fault: dict[str, Any]) -> None:
    """Let the process have ``fault``; none where it is empty.

    ``kind`` is ``call`` (the call number ``at`` of those that change ``below`` fails with the error
    ``code``, or with ``code`` "kill" ends the process after half of it; from then on as well where
    it ``stays``), ``size`` (no file grows over ``bytes``) or ``clock`` (it jumps at each look).
    ``count`` is a file that the number of calls is written to.
    """
    kind = fault.get("kind")
    if kind == "call":
        _Calls(fault).wrap()
    elif kind == "size":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
    elif kind == "clock":
        _jump()
    elif kind == "disk":
        # As if the disk had been filled by others after the run had looked how much is left.
        room = shutil.disk_usage("/")._replace(free=10**12)
        shutil.disk_usage = lambda path: room


class _Calls:
    """Counts the calls that change what lies below a folder."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self.below = str(fault["below"])
        self.at = int(fault["at"])
        self.code = fault["code"]
        self.stays = bool(fault.get("stays"))
        self.log = fault.get("count")
        self.count = 0
        self.files: dict[int, str] = {}  # open file: its path
        self.open = builtins.open

    def wrap(self) -> None:
        for name in CALLS:
            if hasattr(os, name):
                setattr(os, name, self.wrapped(name, getattr(os, name)))
        opened = self.wrap_open(io.open)
        io.open = builtins.open = opened  # type: ignore[assignment]
        os.open = self.wrap_os_open(os.open)
        os.write = self.wrapped("write", os.write)
        import safetensors.torch

        safetensors.torch.serialize_file = self.wrap_save(safetensors.torch.serialize_file)

    def concerns(self, place: object) -> bool:
        if isinstance(place, int):
            try:
                place = os.readlink(f"/proc/self/fd/{place}")
            except OSError:
                return False
            if not place.startswith("/"):
                return False  # a pipe to a process of its own, which no disk can fill
        return isinstance(place, str | os.PathLike) and os.path.abspath(place).startswith(
            self.below
        )

    def step(self, what: str, place: object, half: Callable[[], object] = lambda: None) -> None:
        """Count a call, and let happen what is to happen at it."""
        if not self.concerns(place):
            return
        self.count += 1
        if self.log is not None:
            with self.open(self.log, "a") as file:
                file.write(f"{what} {place}\n")
        if self.count == self.at or (self.stays and self.count > self.at):
            if self.code == "kill":
                half()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.code == errno.ENOSPC and what in ("unlink", "rmdir"):
                return  # a full disk does not keep files from being removed
            half()
            raise OSError(self.code, os.strerror(self.code), str(place))

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **more: Any) -> Any:
            self.step(name, words[0])
            return real(*words, **more)

        return call

    def wrap_os_open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, flags: int, *words: Any, **more: Any) -> Any:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.step("open", path)
            return real(path, flags, *words, **more)

        return call

    def wrap_open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: str = "r", *words: Any, **more: Any) -> Any:
            changes = set(mode) & set("wax+")
            if changes:
                self.step("open", path)
            file = real(path, mode, *words, **more)
            return _Written(file, path, self) if changes and self.concerns(path) else file

        return call

    def wrap_save(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensors: Any, path: Any, *words: Any, **more: Any) -> Any:
            def half() -> None:
                real(tensors, path, *words, **more)
                os.truncate(path, os.path.getsize(path) // 2)

            try:
                self.step("save", path, half)
            except OSError as error:
                from safetensors import SafetensorError

                text = (
                    f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                )
                raise SafetensorError(text) from None
            return real(tensors, path, *words, **more)

        return call


class _Written:
    """A file whose writes are counted; half of the one that fails is written."""

    def __init__(self, file: Any, path: object, calls: _Calls) -> None:
        self._file, self._path, self._calls = file, path, calls

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._calls.step("write", self._path, half)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)


def _jump() -> None:
    """Wall clocks that are set while a run goes on: back by years, ahead by years."""
    real, jumps = time.time, iter([0.0, 1e9, -1.5e9, 3600.0, -7200.0] * 10**6)
    time.time = lambda: real() + next(jumps)
    time.time_ns = lambda: int(time.time() * 1e9)


def mount(folder: Path, size: int, *, again: bool) -> None:
    """Let ``folder`` be a disk of so many bytes, of its own for this process and its children.

    Raises OSError where this process may not.
    """
    import ctypes

    def check(code: int) -> None:
        if code:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, remount, private, recursive = 0x20000, 0x20, 1 << 18, 0x4000
    if not again:
        check(libc.unshare(new_mounts))
        check(libc.mount(b"none", b"/", None, private | recursive, None))
    options = f"size={size}".encode()
    flags = remount if again else 0
    check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options))


def calls_of(log: Path) -> list[str]:
    """The calls that a process without a fault made, in order."""
    return log.read_text().splitlines() if log.exists() else []
