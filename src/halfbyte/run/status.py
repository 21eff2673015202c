"""What a run folder tells of its run: whether a process works on it, and whether it gets on.

That a process lives is in the lock of the folder; that its work gets on is in the record, where
something is written at least every half minute.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.events import Record, read_events
from halfbyte.events.types import (
    Diverged,
    Evaluated,
    Event,
    Finished,
    Heartbeat,
    Interrupted,
    RunStarted,
    Step,
    TrainingStarted,
)
from halfbyte.run.folder import require_run
from halfbyte.run.heartbeat import STARTING
from halfbyte.run.lock import FILE_NAME as LOCK_FILE
from halfbyte.run.lock_holder import Verdict, decoded, judge, this_process

# A run hangs when it has got no further for so long, and for so many times its slowest step or
# evaluation: one may be slower than those before it, for a full disk or a busy GPU.
STALLED_SECONDS, STALLED_TIMES = 300.0, 10.0
# A process whose record has been silent for longer than this has not opened it yet, or is frozen.
SILENT_SECONDS = 120.0
# Whether a lock counts up is seen by two looks, so many beats apart.
LOOKS_APART = 2.0


@dataclass(frozen=True)
class Status:
    """``state`` is "starting" (its process lives and has not written anything yet), "running",
    "stalled" (its process lives and its work gets no further), "dead" (its process is gone in the
    middle), "finished", "interrupted" (a signal asked it to stop) or "stopped" (by what was
    noticed)."""

    state: str
    step: int  # the last one that was recorded
    steps: int | None  # planned
    doing: str  # what the last sign of life says, or nothing
    silent: float  # seconds since anything was recorded, by the clock of this machine
    no_further: float  # seconds for which the work has got no further, as far as it is known
    reason: str  # why it was stopped, or which signal interrupted it

    @property
    def needs_somebody(self) -> bool:
        return self.state in ("stalled", "dead", "stopped")


def run_status(
    folder: Path,
    *,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Status:
    """The status of the run in ``folder``.

    It may take two beats of the lock (ten seconds). Raises RunError where there is no run.
    """
    lock = _Lock(folder / LOCK_FILE, sleep)
    alive = lock.alive()
    if not alive:
        require_run(folder)
    records = list(read_events(folder))
    starts = [i for i, r in enumerate(records) if isinstance(r.event, RunStarted)]
    last = [r.event for r in records[starts[-1] if starts else 0 :]]
    steps = [e.step for e in last if isinstance(e, Step)]
    planned = [e.steps for e in last if isinstance(e, TrainingStarted)]
    beat = last[-1] if last and isinstance(last[-1], Heartbeat) else None
    silent = max(0.0, now() - records[-1].time) if records else math.inf
    doing = beat.doing if beat else ""
    no_further = silent + (beat.since if beat else 0.0)
    if alive and silent > SILENT_SECONDS:
        state = "starting" if lock.counts() else "stalled"
        sign = _starting(folder)
        if state == "starting" and sign is not None:
            doing, no_further = sign[1].doing, max(0.0, now() - sign[0]) + sign[1].since
    elif any(isinstance(e, Finished) for e in last):
        state = "finished"
    elif not alive:
        state = _ended(last)
    else:
        state = "stalled" if no_further > _bound(records) else "running"
    return Status(
        state=state,
        step=steps[-1] if steps else 0,
        steps=planned[-1] if planned else None,
        doing=doing,
        silent=silent,
        no_further=no_further,
        reason=_reason(last),
    )


def _starting(folder: Path) -> tuple[float, Heartbeat] | None:
    """When the last sign of life was given before there was a record, and what it says."""
    try:
        values = json.loads((folder / STARTING).read_text(encoding="utf-8"))
        sign = Heartbeat(str(values["doing"]), float(values["since"]), 0.0)
        return float(values["time"]), sign
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _ended(last: Sequence[Event]) -> str:
    if any(isinstance(e, Interrupted) for e in last):
        return "interrupted"
    return "stopped" if any(isinstance(e, Diverged) for e in last) else "dead"


def _reason(last: Sequence[Event]) -> str:
    found = [e.reason for e in last if isinstance(e, Diverged)]
    found += [e.signal for e in last if isinstance(e, Interrupted)]
    return found[-1] if found else ""


def _bound(records: Sequence[Record]) -> float:
    """Seconds after which a run that has got no further hangs."""
    slowest = max(
        (r.event.seconds for r in records if isinstance(r.event, Step | Evaluated)), default=0.0
    )
    return max(STALLED_SECONDS, STALLED_TIMES * slowest)


class _Lock:
    """The lock of a run folder, only looked at."""

    def __init__(self, path: Path, sleep: Callable[[float], None]) -> None:
        self.path, self.sleep = path, sleep
        self.raw = self._read()

    def alive(self) -> bool:
        """Whether the process that holds it lives; False where nobody does."""
        holder = None if self.raw is None else decoded(self.raw)
        if holder is None:
            return False
        verdict = judge(holder, this_process("", holder.beat))
        return self.counts() if verdict is Verdict.UNKNOWN else verdict is Verdict.LIVING

    def counts(self) -> bool:
        """Whether it counts up, so that its process does not only live."""
        holder = None if self.raw is None else decoded(self.raw)
        if holder is None:
            return False
        self.sleep(min(max(holder.beat, 0.01), 60.0) * LOOKS_APART)
        after = self._read()
        return after is not None and after != self.raw

    def _read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except OSError:
            return None


def as_json(status: Status) -> str:
    """One line for a program."""
    values = {**vars(status), "needs_somebody": status.needs_somebody}
    # JSON has no infinity: nothing was ever recorded.
    return json.dumps({k: None if v == math.inf else v for k, v in values.items()})
