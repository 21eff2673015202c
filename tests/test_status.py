"""Whether a run goes on, hangs or has ended, by its lock and its record."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halfbyte.cli.app import app
from halfbyte.errors import RunError
from halfbyte.events import EventLog, Record, read_events
from halfbyte.events.types import Finished, Heartbeat, RunStarted, Step
from halfbyte.run.heartbeat import STARTING
from halfbyte.run.lock import FILE_NAME, RunLock
from halfbyte.run.lock_holder import decoded, this_process
from halfbyte.run.status import Status, run_status
from run_records import write_run


def still(seconds: float) -> None:
    """Nothing happens meanwhile."""


def counting(folder: Path) -> Callable[[float], None]:
    """The holder of the lock counts up meanwhile."""

    def sleep(seconds: float) -> None:
        holder = decoded((folder / FILE_NAME).read_bytes())
        assert holder is not None
        (folder / FILE_NAME).write_bytes(replace(holder, count=holder.count + 1).encoded())

    return sleep


def at(folder: Path, after: float, sleep: Callable[[float], None] = still) -> Status:
    """The status so many seconds after the last that was recorded."""
    last = list(read_events(folder))[-1].time
    return run_status(folder, now=lambda: last + after, sleep=sleep)


def beat(folder: Path, doing: str, since: float, after: float) -> None:
    last = list(read_events(folder))[-1].time
    with EventLog(folder) as log:
        log.write(Record(last + after, Heartbeat(doing, since, 1.0)))


@pytest.mark.parametrize(
    ("end", "state"),
    [
        ("finished", "finished"),
        ("interrupted", "interrupted"),
        ("diverged", "stopped"),
        ("cut", "dead"),
    ],
)
def test_a_run_that_nobody_works_on(tmp_path: Path, end: str, state: str) -> None:
    folder = write_run(tmp_path / "run", done=120 if end == "finished" else 50, end=end)
    found = at(folder, 1e6)
    assert (found.state, found.steps) == (state, 120)
    assert found.step == (120 if end == "finished" else 50)
    assert found.needs_somebody == (state in ("stopped", "dead"))
    with pytest.raises(RunError, match="holds no run"):
        run_status(tmp_path)


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", done=50, end="cut")
    slowest = max(r.event.seconds for r in read_events(folder) if isinstance(r.event, Step))
    assert slowest < 10
    with RunLock(folder):
        assert at(folder, 20).state == "running"
        beat(folder, "step 51", 200.0, 30)
        found = at(folder, 20)
        assert (found.state, found.doing) == ("running", "step 51")
        assert found.no_further == pytest.approx(220, abs=0.01)
        beat(folder, "step 51", 290.0, 30)
        assert at(folder, 5).state == "running"
        assert at(folder, 15).state == "stalled"
        assert at(folder, 15).needs_somebody
    assert at(folder, 15).state == "dead"  # its lock is gone


def test_a_slow_run_is_no_hanging_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", done=50, end="cut", events={"step": {"seconds": 60.0}})
    beat(folder, "step 51", 590.0, 30)
    with RunLock(folder):
        assert at(folder, 5).state == "running"
        assert at(folder, 15).state == "stalled"


def test_a_process_that_has_not_written_anything_yet(tmp_path: Path) -> None:
    """It may be the next one in a folder with an old record; one that is frozen does not count."""
    for end in ("interrupted", "finished"):
        folder = write_run(tmp_path / end, done=120 if end == "finished" else 50, end=end)
        (folder / FILE_NAME).write_bytes(this_process("x" * 32, 5.0).encoded())
        assert at(folder, 1e5, counting(folder)).state == "starting"
        assert at(folder, 1e5).state == "stalled"
    new = tmp_path / "new"
    new.mkdir()
    (new / FILE_NAME).write_bytes(this_process("x" * 32, 5.0).encoded())
    found = run_status(new, sleep=counting(new))
    assert found.doing == ""
    text = json.dumps({"time": 1000.0, "doing": "quantize", "since": 40.0, "cpu_seconds": 3.0})
    (new / STARTING).write_text(text, encoding="utf-8")
    found = run_status(new, now=lambda: 1020.0, sleep=counting(new))
    assert (found.doing, found.no_further) == ("quantize", 60.0)
    assert (found.state, found.step, found.steps) == ("starting", 0, None)
    assert math.isinf(found.silent)


def test_a_lock_that_was_left_behind(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", done=50, end="cut")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    holder = replace(this_process("x" * 32, 5.0), pid=ended.pid)
    (folder / FILE_NAME).write_bytes(holder.encoded())
    assert at(folder, 10).state == "dead"
    # One of another machine can only be watched.
    elsewhere = replace(holder, host="another", boot="another", machine="another", pids=1)
    (folder / FILE_NAME).write_bytes(elsewhere.encoded())
    assert at(folder, 10).state == "dead"
    assert at(folder, 10, counting(folder)).state == "running"
    (folder / FILE_NAME).write_bytes(b"{}")
    assert at(folder, 10).state == "dead"


def test_what_the_last_process_did_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", done=50, end="interrupted")
    with EventLog(folder) as log:
        log.write(Record(2e9, RunStarted("0.1.0", ["halfbyte"], "run", 48)))
    assert at(folder, 10).state == "dead"
    with EventLog(folder) as log:
        log.write(Record(2e9 + 1, Finished(120, 1.0)))
    assert at(folder, 10).state == "finished"


def test_the_command(tmp_path: Path) -> None:
    def said(folder: Path, *more: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["status", str(folder), *more])
        return result.exit_code, result.output

    finished = write_run(tmp_path / "finished")
    assert said(finished) == (0, "finished after step 120 of 120.\n")
    cut = write_run(tmp_path / "cut", done=50, end="cut")
    code, text = said(cut)
    assert code == 1
    assert text.startswith(
        "dead: its process ended in the middle, after step 50 of 120; go on with"
    )
    assert f"halfbyte train --resume {cut}" in text
    code, text = said(write_run(tmp_path / "stopped", done=50, end="diverged"))
    assert (code, text) == (
        1,
        "stopped at step 50 of 120, since the loss of step 50 is NaN on rows 4, 9, 32 and 121.\n",
    )
    values = json.loads(said(cut, "--json")[1])
    assert (values["state"], values["step"], values["needs_somebody"]) == ("dead", 50, True)
    code, text = said(tmp_path / "nothing")
    assert code == 2
