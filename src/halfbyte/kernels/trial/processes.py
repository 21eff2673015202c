"""Every kernel that a run will use, tried once beforehand in processes of their own.

A compiler that gives up may end its process (LLVM aborts), and so may a kernel that reads what it
must not: here that ends a process which had nothing else to do, and the run takes PyTorch's own
operations in the kernel's place. Several processes share the work, so that the same minute of
compiling is over sooner, and all that they compile is in the cache when the run asks for it. A
trial that went well leaves a mark there, and the next run with the same needs starts no process.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from halfbyte.kernels import choice
from halfbyte.kernels.choice import PLAIN, Kernels
from halfbyte.kernels.trial.spec import TrialSpec, kernel_of, trial_tasks

WORKER = (sys.executable, "-P", "-m", "halfbyte.kernels.trial.worker")
START_SECONDS = 180.0  # to import PyTorch from a slow disk and to open the device
TASK_SECONDS = 180.0  # to compile and run one kernel in all its variants
_POLL_SECONDS = 0.02

_ATTENTION = ("attention", "attention_backward", "attention_lse_shape")


@dataclass(frozen=True)
class Outcome:
    """What a trial showed: by kernel, why it is not used, or why it could not be tried."""

    replaced: dict[str, str] = field(default_factory=dict)
    untried: dict[str, str] = field(default_factory=dict)


class Trial:
    """A trial under way; its ``with`` statement ends whatever is left of it."""

    def __init__(
        self,
        spec: TrialSpec,
        folder: Path,
        *,
        workers: int,
        command: Sequence[str] = WORKER,
        start_seconds: float = START_SECONDS,
        task_seconds: float = TASK_SECONDS,
    ) -> None:
        self.spec, self.command, self.workers = spec, tuple(command), max(1, workers)
        self.start_seconds, self.task_seconds = start_seconds, task_seconds
        self.tasks = trial_tasks(spec)
        self.mark = folder / f"halfbyte-{spec.fingerprint(*_versions())}.json"
        self._outcome: Outcome | None = None
        self._running: list[_Worker] = []
        self._where: Path | None = None
        self._started = 0
        if self.mark.exists() or not self.tasks:
            self._outcome = Outcome()
            return
        self._where = Path(tempfile.mkdtemp(prefix="halfbyte-trial-"))
        (self._where / "spec.json").write_text(spec.to_json(), encoding="utf-8")
        for _ in range(min(self.workers, len(self.tasks))):
            self._start()

    def __enter__(self) -> Trial:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the processes that are still at work and remove what they shared."""
        for worker in self._running:
            worker.kill()
        self._running.clear()
        if self._where is not None:
            shutil.rmtree(self._where, ignore_errors=True)

    def finish(self) -> Outcome:
        """Wait for the end of the trial, and mark it if all went well."""
        if self._outcome is None:
            self._outcome = self._judge()
            if not self._outcome.replaced and not self._outcome.untried:
                # Without a mark the next run tries again, and no more than that.
                with contextlib.suppress(OSError):
                    self.mark.write_text(self.spec.to_json() + "\n", encoding="utf-8")
            self.stop()
        return self._outcome

    def _judge(self) -> Outcome:
        died: dict[str, str] = {}
        why = self._wait(died)
        # Those who died may have left tasks that nobody took; each round ends some.
        while self._untaken() and self._taken() and len(died) < len(self.tasks):
            before = len(self._untaken())
            for _ in range(min(self.workers, before)):
                self._start()
            why = self._wait(died) or why
            if len(self._untaken()) == before:
                break
        # A process of its own for each that ended one, or found no memory beside the others.
        verdicts = self._verdicts()
        again = [
            task
            for task in self.tasks
            if task in died or verdicts.get(task, ("ok", ""))[0] in ("broken", "memory")
        ]
        died.clear()
        for start in range(0, len(again), self.workers):
            for task in again[start : start + self.workers]:
                self._forget(task)
                self._start(task)
            self._wait(died)
        verdicts = self._verdicts()
        replaced: dict[str, str] = {}
        untried: dict[str, str] = {}
        for task in self.tasks:
            kernel = kernel_of(task)
            verdict, reason = verdicts.get(task, ("died", died.get(task, "")))
            if verdict == "memory" or (verdict == "died" and task not in died):
                untried.setdefault(kernel, reason or why or "no process could try it")
            elif verdict != "ok":
                replaced.setdefault(kernel, reason)
        return Outcome(replaced, {k: why for k, why in untried.items() if k not in replaced})

    def _start(self, *tasks: str) -> None:
        assert self._where is not None
        self._started += 1
        log = self._where / f"{self._started}.log"
        # What cannot even be started has tried nothing.
        with contextlib.suppress(OSError), log.open("wb") as out:
            process = _spawn([*self.command, str(self._where / "spec.json"), *tasks], out)
            self._running.append(_Worker(process, log, time.monotonic()))

    def _wait(self, died: dict[str, str]) -> str:
        """Until no process is at work. Adds to ``died`` the tasks that ended theirs, and why.

        Returns why the last of those that took no task ended, if any ended badly.
        """
        assert self._where is not None
        why = "" if self._running else "no process could be started"
        while self._running:
            time.sleep(_POLL_SECONDS)
            # Who has ended is asked first: what it took and gave is then all there to be read.
            codes = [worker.process.poll() for worker in self._running]
            for worker, code in zip(list(self._running), codes, strict=True):
                if code is None:
                    open_task = self._at(worker)[0]
                    ended = worker.too_long(open_task, self.start_seconds, self.task_seconds)
                    if not ended:
                        continue
                    worker.kill()
                else:
                    ended = "" if code == 0 else _ending(code)
                self._running.remove(worker)
                open_task, took_any = self._at(worker)
                if not ended and open_task is None:
                    continue
                reason = "; ".join(filter(None, [ended, worker.last_line()]))
                if open_task is not None:
                    died[open_task] = reason
                elif not took_any:
                    why = reason
        return why

    def _at(self, worker: _Worker) -> tuple[str | None, bool]:
        """The task that ``worker`` took and gave no verdict of, and whether it took any."""
        pid = str(worker.process.pid)
        mine = [task for task in self.tasks if _read(self._path(task, "claim")) == pid]
        verdicts = self._verdicts()
        return next((task for task in mine if task not in verdicts), None), bool(mine)

    def _taken(self) -> list[str]:
        return [task for task in self.tasks if self._path(task, "claim").exists()]

    def _untaken(self) -> list[str]:
        return [task for task in self.tasks if not self._path(task, "claim").exists()]

    def _verdicts(self) -> dict[str, tuple[str, str]]:
        found = {}
        for task in self.tasks:
            text = _read(self._path(task, "json"))
            if text:
                result = json.loads(text)
                found[task] = (result["verdict"], result["reason"])
        return found

    def _forget(self, task: str) -> None:
        for kind in ("claim", "json"):
            self._path(task, kind).unlink(missing_ok=True)

    def _path(self, task: str, kind: str) -> Path:
        assert self._where is not None
        return self._where / f"{task}.{kind}"


def start_trial(spec: TrialSpec, folder: Path, *, workers: int) -> Trial:
    """Begin to try the kernels of ``spec`` in so many processes; returns at once.

    ``folder`` is where compiled kernels are kept (:mod:`halfbyte.kernels.cache`).
    """
    return Trial(spec, folder, workers=workers)


def without(kernels: Kernels, tried: Kernels, replaced: Collection[str]) -> Kernels:
    """``kernels`` with something else for each that is named and is the one that was ``tried``.

    That is its reference, or for Triton's attention what comes closest to it in speed. The two
    passes of attention stay together, since what one leaves the other reads.
    """
    changes: dict[str, Any] = {}
    for name in in_use(kernels, tried, replaced):
        if name not in _ATTENTION:
            changes[name] = getattr(PLAIN, name)
        elif kernels.attention is choice.ELEMENTWISE.attention:
            changes |= {part: getattr(PLAIN, part) for part in _ATTENTION}
        else:
            changes |= {part: getattr(choice.ELEMENTWISE, part) for part in _ATTENTION}
    return replace(kernels, **changes)


def in_use(kernels: Kernels, tried: Kernels, names: Collection[str]) -> list[str]:
    """Those of ``names`` under which ``kernels`` has what was ``tried``."""
    return [name for name in names if getattr(kernels, name) is getattr(tried, name)]


class _Worker:
    """A process that tries kernels."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, began: float) -> None:
        self.process, self.log, self.began = process, log, began
        self._task: str | None = None

    def too_long(self, task: str | None, start_seconds: float, task_seconds: float) -> str:
        """That it has been at ``task`` (None: between two) for too long; empty if it has not."""
        now = time.monotonic()
        if task != self._task:
            self._task, self.began = task, now
        limit = start_seconds if task is None else task_seconds
        return f"not done after {limit:.0f} s" if now - self.began > limit else ""

    def kill(self) -> None:
        """End it and the compilers that it has started."""
        if self.process.poll() is None:
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.wait()

    def last_line(self) -> str:
        lines = [line.strip() for line in _read(self.log).splitlines() if line.strip()]
        return lines[-1] if lines else ""


def _spawn(command: list[str], out: IO[bytes]) -> subprocess.Popen[bytes]:
    # Where halfbyte was imported from, in case that is a path this process alone looks in.
    root = str(Path(__file__).resolve().parents[2])
    paths = [path for path in (os.environ.get("PYTHONPATH"), root) if path]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process ended with code {code}"
    try:
        return f"its process was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"its process was ended by signal {-code}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _versions() -> tuple[str, str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return torch.__version__, triton
