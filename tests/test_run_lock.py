"""The lock of a run folder: one holder among many, the dead told from the living."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.errors import RunError
from halfbyte.run import lock as lock_file
from halfbyte.run.lock import FILE_NAME, MISSED, RunLock
from halfbyte.run.lock_holder import Holder, Verdict, decoded, judge, this_process

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
forked = multiprocessing.get_context("fork") if sys.platform == "linux" else None


def elsewhere(**changes: object) -> Holder:
    """A holder on another machine."""
    other = replace(this_process("other", 5.0), host="far", boot="another", machine="third")
    return replace(other, **changes)


def write(folder: Path, holder: Holder) -> None:
    (folder / FILE_NAME).write_bytes(holder.encoded())


def until(seen: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not seen() and time.monotonic() < end:
        time.sleep(0.01)
    assert seen()


@pytest.fixture
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


# One holder at a time. A child that is inside makes a file that only one can make.


def contend(folder: Path, start: object, seed: int, results: object) -> None:
    chance = random.Random(seed)
    read, create, rename = lock_file._read, lock_file._create, lock_file._rename

    def slowed(act: Callable[..., object]) -> Callable[..., object]:
        def slow(*words: object) -> object:
            time.sleep(chance.random() * 0.01)
            done = act(*words)
            time.sleep(chance.random() * 0.01)
            return done

        return slow

    lock_file._read, lock_file._create = slowed(read), slowed(create)  # type: ignore[assignment]
    lock_file._rename = slowed(rename)  # type: ignore[assignment]
    start.wait()  # type: ignore[attr-defined]
    for _ in range(4):
        try:
            with RunLock(folder, beat=0.05):
                try:
                    os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    results.put("two")  # type: ignore[attr-defined]
                    return
                time.sleep(chance.random() * 0.02)
                os.unlink(folder / "inside")
                results.put("one")  # type: ignore[attr-defined]
        except RunError:
            results.put("refused")  # type: ignore[attr-defined]
        time.sleep(chance.random() * 0.01)


@linux
@pytest.mark.parametrize("left", ["nothing", "dead", "dead twice", "garbage", "far"])
@pytest.mark.parametrize("seed", [1, 2])
def test_many_processes_want_one_folder(
    left: str, seed: int, tmp_path: Path, dead_pid: int
) -> None:
    assert forked is not None
    gone = replace(this_process("gone", 0.05), pid=dead_pid, start=1.0)
    if left.startswith("dead"):
        write(tmp_path, gone)
    if left == "dead twice":
        (tmp_path / f"{FILE_NAME}.next").write_bytes(replace(gone, token="b").encoded())
    if left == "garbage":
        (tmp_path / FILE_NAME).write_bytes(b'{"host": ')
    if left == "far":
        write(tmp_path, elsewhere(beat=0.05))
    start, results = forked.Event(), forked.SimpleQueue()
    children = [
        forked.Process(target=contend, args=(tmp_path, start, 100 * seed + n, results))
        for n in range(8)
    ]
    for child in children:
        child.start()
    start.set()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    found = []
    while not results.empty():
        found.append(results.get())
    assert "two" not in found
    assert "one" in found
    assert not list(tmp_path.iterdir())  # everything was released


# A holder that a crash ended.


@linux
def test_a_killed_holder_is_followed_and_that_is_said(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from halfbyte.run.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "in\n"
    with pytest.raises(RunError, match=rf"in use: process {child.pid} on .*; let it end"):
        RunLock(tmp_path).__enter__()
    child.send_signal(signal.SIGKILL)
    # Not waited for yet: what is left of it is a zombie, which trains nothing.
    until(lambda: (Path(f"/proc/{child.pid}/stat").read_text().split()[2]) == "Z")
    told: list[str] = []
    with RunLock(tmp_path, tell=told.append):
        assert len(told) == 1
        assert f"process {child.pid} on" in told[0]
    child.wait()
    child.stdout.close()
    told.clear()
    with RunLock(tmp_path, tell=told.append):
        assert not told  # released in good order: nothing to say


@linux
def test_verdicts(dead_pid: int) -> None:
    here = this_process("mine", 5.0)
    first = replace(here, pids=4026531836)
    cases = {
        "itself": (here, here, Verdict.LIVING),
        "ended": (replace(here, pid=dead_pid), here, Verdict.DEAD),
        "its number was given to another": (replace(here, start=3.0), here, Verdict.DEAD),
        "a container's, same kernel": (replace(here, pids=1), here, Verdict.UNKNOWN),
        "no namespace known": (replace(here, pids=None), replace(here, pids=None), Verdict.UNKNOWN),
        "restarted": (replace(first, boot="earlier", pid=1), first, Verdict.DEAD),
        "a like-named container": (replace(here, boot="x", pids=1), here, Verdict.UNKNOWN),
        "a like-named machine": (replace(first, boot="x", machine="y"), first, Verdict.UNKNOWN),
        "no machine id": (
            replace(first, boot="x", machine=None),
            replace(first, machine=None),
            Verdict.UNKNOWN,
        ),
        "another machine": (elsewhere(pid=dead_pid), here, Verdict.UNKNOWN),
        "not Linux, ended": (
            replace(here, boot=None, pid=dead_pid),
            replace(here, boot=None),
            Verdict.UNKNOWN,
        ),
        "not Linux, living": (replace(here, boot=None), replace(here, boot=None), Verdict.LIVING),
        "no such number": (replace(here, pid=2**40), here, Verdict.DEAD),
    }
    if here.machine is None:
        here = replace(here, machine="m")
    assert {name: judge(a, b) for name, (a, b, _) in cases.items()} == {
        name: verdict for name, (_, _, verdict) in cases.items()
    }


@linux
def test_another_user_s_process_that_proc_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    here = this_process("mine", 5.0)
    monkeypatch.setattr("halfbyte.run.lock_holder._start", lambda pid: None)

    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert judge(here, here) is Verdict.UNKNOWN


# A holder that cannot be asked: watched, by looks and not by clocks.


class Sleeper:
    """Counts the looks; at each of them the clocks of the machine jump, and ``act`` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
        self.looks = 0
        self.act = act
        self.chance = random.Random(0)
        for name in ("time", "monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: self.chance.uniform(-1e9, 1e9))

    def __call__(self, seconds: float) -> None:
        self.looks += 1
        self.act(self.looks)


def test_a_silent_holder_elsewhere_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, elsewhere())
    told: list[str] = []
    with monkeypatch.context() as patch:
        sleeper = Sleeper(patch, lambda looks: None)
        with RunLock(tmp_path, tell=told.append, sleep=sleeper) as lock:
            lock.check()
            assert sleeper.looks == MISSED * 4
    assert [("looking for 30 seconds" in t, "taken over" in t) for t in told] == [
        (True, False),
        (False, True),
    ]
    assert "on far" in told[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", [1, MISSED * 4])
def test_a_holder_elsewhere_that_counts_up_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    write(tmp_path, elsewhere())

    def count_up(looks: int) -> None:
        if looks == at:
            write(tmp_path, elsewhere(count=1))

    with monkeypatch.context() as patch:
        sleeper = Sleeper(patch, count_up)
        with pytest.raises(RunError, match=r"in use: process \d+ on far trains there"):
            RunLock(tmp_path, sleep=sleeper).__enter__()
    assert sleeper.looks == at
    assert decoded((tmp_path / FILE_NAME).read_bytes()) == elsewhere(count=1)
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_a_holder_elsewhere_that_goes_while_it_is_watched(tmp_path: Path) -> None:
    write(tmp_path, elsewhere())
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            (tmp_path / FILE_NAME).unlink()

    with RunLock(tmp_path, sleep=sleep):
        assert len(looks) == 3


@pytest.mark.parametrize("held", [b"", b"\x00" * 1024, b"[]", b'{"host": "a"}', b"\xff\xfe"])
def test_a_damaged_record_is_watched_then_replaced(tmp_path: Path, held: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(held)
    told: list[str] = []
    looks: list[float] = []
    with RunLock(tmp_path, tell=told.append, sleep=looks.append):
        assert len(looks) == MISSED * 4
        assert "damaged" in told[0]
    assert not list(tmp_path.iterdir())


@linux
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_container_of_the_same_machine(tmp_path: Path) -> None:
    """Another namespace of process ids: the number in the record names somebody else there."""
    script = (
        "import os, sys, time; from pathlib import Path; from halfbyte.run.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1]), beat=0.1): print(os.getpid(), flush=True); time.sleep(60)"
    )
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    child = subprocess.Popen(
        [*command, sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        pytest.skip("this machine lets nobody make a namespace")
    assert int(line) < 10  # in there
    with pytest.raises(RunError, match="in use"):
        RunLock(tmp_path).__enter__()
    child.kill()
    child.wait()
    child.stdout.close()
    told: list[str] = []
    with RunLock(tmp_path, tell=told.append):
        assert "looking for" in told[0]


# A lock that is taken from its holder.


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[RunLock]:
    with RunLock(tmp_path, beat=0.02) as lock:
        yield lock


def test_a_deleted_lock_is_noticed(taken: RunLock) -> None:
    taken.check()
    taken.path.unlink()
    until(lambda: taken.lost)
    assert "no longer there" in str(taken.lost)


def test_a_replaced_lock_is_noticed_and_left_alone(taken: RunLock, tmp_path: Path) -> None:
    other = elsewhere()
    (tmp_path / "new").write_bytes(other.encoded())
    (tmp_path / "new").replace(taken.path)
    until(lambda: taken.lost)
    assert "process" in str(taken.lost)
    assert "on far" in str(taken.lost)
    with pytest.raises(RunError, match="on far has it"):
        taken.check()
    taken.__exit__()
    assert decoded(taken.path.read_bytes()) == other


def test_a_check_does_not_wait_for_the_heartbeat(tmp_path: Path) -> None:
    with RunLock(tmp_path, beat=1000.0) as lock:
        lock.path.write_bytes(b"")
        with pytest.raises(RunError, match="overwritten"):
            lock.check()


def test_a_folder_that_vanishes_takes_the_lock_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with RunLock(folder, beat=0.02) as lock:
        shutil.rmtree(folder)
        until(lambda: lock.lost)
    assert not folder.exists()


def test_a_disk_that_does_not_answer_says_nothing_of_the_lock(
    taken: RunLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[object] = []

    def fail(*words: object) -> int:
        tries.append(words)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(lock_file.os, "open", fail)
        until(lambda: len(tries) > 3)
    assert taken.lost is None
    taken.check()


def test_the_holder_counts_up_in_place(taken: RunLock) -> None:
    def count() -> int:
        found = decoded(taken.path.read_bytes())
        assert found is not None
        return found.count

    before, file = count(), taken.path.stat().st_ino
    until(lambda: count() > before + 2)
    assert taken.path.stat().st_ino == file


# What else can be wrong.


def test_one_process_holds_a_folder_once(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(RunError, match="of this very process"):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


@linux
def test_a_fork_of_the_holder_releases_nothing(tmp_path: Path) -> None:
    assert forked is not None
    with RunLock(tmp_path) as lock:
        child = forked.Process(target=lock.__exit__)
        child.start()
        child.join()
        lock.check()


def test_folders_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"cannot be locked .*No such file"):
        RunLock(tmp_path / "absent").__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot be locked .*Not a directory"):
        RunLock(tmp_path / "file").__enter__()
    if sys.platform == "linux":  # root may write into any folder but this kind
        with pytest.raises(RunError, match="cannot be locked"):
            RunLock(Path("/sys/kernel")).__enter__()
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(RunError, match=r"cannot be locked .*Is a directory"):
        RunLock(tmp_path).__enter__()


def test_a_full_disk_leaves_no_half_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for way in (full, lambda fd, data: 10):
        with monkeypatch.context() as patch:
            patch.setattr(lock_file.os, "write", way)
            with pytest.raises(RunError, match="No space left"):
                RunLock(tmp_path).__enter__()
        assert not list(tmp_path.iterdir())
