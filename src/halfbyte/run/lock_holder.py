"""Who holds a run folder, and whether that process still lives.

A process id says something only where it was given: on the same boot of the same kernel (the boot
id is a random number made at each start) and in the same namespace of process ids (two containers
of one machine have the same boot id and may have the same host name). Everywhere else the holder
can only be watched: it counts up in its lock every few seconds.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import psutil

RECORD_BYTES = 1024  # always written whole and in place, so that a reader finds the old or the new
_FIRST_NAMESPACE = 4026531836  # of process ids: the machine's own, not a container's


class Verdict(Enum):
    """What can be said of a holder by looking at it once."""

    LIVING = "living"
    DEAD = "dead"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Holder:
    """A process as its lock names it."""

    host: str
    machine: str | None  # the installation's id, the same after a restart
    boot: str | None  # the id of the kernel's start
    pids: int | None  # the namespace that ``pid`` is of
    pid: int
    start: float  # Linux: in clock ticks since the boot; elsewhere in unix seconds
    token: str  # random, of this one lock
    beat: float  # seconds between two counts
    count: int = 0

    def encoded(self) -> bytes:
        """The ``RECORD_BYTES`` bytes that the lock file holds."""
        return json.dumps(asdict(self)).encode().ljust(RECORD_BYTES - 1) + b"\n"

    @property
    def words(self) -> str:
        return f"process {self.pid} on {self.host}"


def decoded(raw: bytes) -> Holder | None:
    """The holder that a lock file names; None where it holds something else, or half a record."""
    try:
        values = json.loads(raw)
        holder = Holder(**values)
        numbers = (holder.pid, holder.start, holder.beat, holder.count)
        texts = (holder.host, holder.token, holder.machine or "", holder.boot or "")
        right = all(type(n) in (int, float) for n in numbers) and holder.pid > 0
        return holder if right and all(isinstance(t, str) for t in texts) else None
    except (ValueError, TypeError):
        return None


def this_process(token: str, beat: float) -> Holder:
    """This process as the holder of a lock."""
    pid = os.getpid()
    started = _start(pid)
    return Holder(
        host=socket.gethostname()[:200],
        machine=_text("/etc/machine-id"),
        boot=_text("/proc/sys/kernel/random/boot_id"),
        pids=_pid_namespace(),
        pid=pid,
        start=0.0 if started is None else started,
        token=token,
        beat=beat,
    )


def judge(holder: Holder, here: Holder) -> Verdict:
    """Whether ``holder`` lives, as far as the process ``here`` can tell without watching it."""
    if holder.boot is not None and holder.boot == here.boot:
        same = holder.pids is not None and holder.pids == here.pids
        return _by_pid(holder) if same else Verdict.UNKNOWN
    if holder.host != here.host:
        return Verdict.UNKNOWN
    if holder.boot is None and here.boot is None:  # not Linux
        living = _by_pid(holder) is Verdict.LIVING
        return Verdict.LIVING if living else Verdict.UNKNOWN
    # A host name alone does not make a machine (containers, "localhost" on a shared disk).
    restarted = holder.boot is not None and here.boot is not None
    same_machine = holder.machine is not None and holder.machine == here.machine
    no_containers = holder.pids == here.pids == _FIRST_NAMESPACE
    return Verdict.DEAD if restarted and same_machine and no_containers else Verdict.UNKNOWN


def _by_pid(holder: Holder) -> Verdict:
    if sys.platform != "linux":
        try:
            started = float(psutil.Process(holder.pid).create_time())
        except psutil.NoSuchProcess:
            return Verdict.DEAD
        except psutil.Error:
            return Verdict.UNKNOWN
        return Verdict.LIVING if abs(started - holder.start) < 1 else Verdict.DEAD
    started = _start(holder.pid)
    if started is not None:
        return Verdict.LIVING if started == holder.start else Verdict.DEAD
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return Verdict.DEAD
    except PermissionError:
        pass
    return Verdict.UNKNOWN  # /proc hides other users' processes


def _start(pid: int) -> float | None:
    """When a process started; None where that cannot be read, -1 where only its body is left.

    psutil's time on Linux is made from the wall clock, which can be set while a process runs.
    """
    if sys.platform != "linux":
        with suppress(psutil.Error):
            return float(psutil.Process(pid).create_time())
        return None
    text = _text(f"/proc/{pid}/stat")
    if text is None:
        return None
    state, *fields = text[text.rindex(")") + 1 :].split()  # a name may hold spaces and brackets
    return -1.0 if state in ("Z", "X") else float(fields[18])


def _pid_namespace() -> int | None:
    with suppress(OSError):
        # A container may be shown the /proc of another namespace.
        if os.readlink("/proc/self") == str(os.getpid()):
            return os.stat("/proc/self/ns/pid").st_ino
    return None


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None
