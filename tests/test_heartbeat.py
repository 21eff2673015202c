"""A sign of life in the record of a run that writes nothing else; any thread may write a line."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import halfbyte.run.heartbeat as heartbeat
import halfbyte.run.record as record_module
from halfbyte.events import EventLog, Record, read_events
from halfbyte.events.types import Event, Heartbeat, Phase, StopAsked, Warned
from halfbyte.report.story import read_story
from halfbyte.run.record import RunRecord
from run_records import write_run


class Clock:
    """Seconds that pass when told to."""

    now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (heartbeat, record_module):
        monkeypatch.setattr(module.time, "monotonic", clock.monotonic)
    # The thread is tested by itself.
    monkeypatch.setattr(record_module, "HeartbeatThread", lambda beat: Stopped())
    return clock


class Stopped:
    def stop(self) -> None:
        pass


def written(folder: Path) -> list[Event]:
    return [record.event for record in read_events(folder)]


def signs(folder: Path) -> list[tuple[str, float]]:
    return [(e.doing, e.since) for e in written(folder) if isinstance(e, Heartbeat)]


def test_half_a_minute_without_an_event_gives_one(tmp_path: Path, clock: Clock) -> None:
    heard: list[Event] = []
    record = RunRecord([heard.append])
    clock.now += 100
    assert record.beat() > 0  # nothing is written before the folder is there
    record.open(tmp_path)
    for _ in range(5):  # an event every 20 seconds: no sign
        clock.now += 20
        record(Warned("…"))
        record.beat()
    assert signs(tmp_path) == []
    with record.phase("save"):
        clock.now += 29
        assert record.beat() == pytest.approx(1)
        clock.now += 1
        record.tell(StopAsked("SIGINT"))  # heard, and not written
        assert record.beat() == 30
        clock.now += 12
        record.work.mark()
        clock.now += 18
        record.beat()
        clock.now += 29
        record.beat()
    assert signs(tmp_path) == [("save", 30.0), ("save", 18.0)]
    clock.now += 31
    record.beat()
    assert signs(tmp_path)[2] == ("starting", 31.0)
    assert not any(isinstance(event, Heartbeat) for event in heard)
    record.close()
    record.beat()  # the file is closed: nothing happens


def test_signs_before_there_is_a_record(tmp_path: Path, clock: Clock) -> None:
    """So that a model that is being read can be told from one that hangs; nothing of it stays."""
    record, ours = RunRecord(), [True]
    record.prepare(tmp_path, ours=lambda: ours[-1])
    with record.phase("quantize"):
        clock.now += 31
        assert record.beat() == 30
        sign = json.loads((tmp_path / heartbeat.STARTING).read_text(encoding="utf-8"))
        assert (sign["doing"], sign["since"]) == ("quantize", 31.0)
        assert [path.name for path in tmp_path.iterdir()] == [heartbeat.STARTING]
    record.open(tmp_path)
    clock.now += 31
    record.beat()
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]
    assert signs(tmp_path) == [("starting", 31.0)]
    ours.append(False)  # another process has the folder by now
    clock.now += 31
    record.beat()
    assert len(signs(tmp_path)) == 1
    record.close()
    failed = RunRecord()
    failed.prepare(tmp_path)
    failed.beat()
    assert (tmp_path / heartbeat.STARTING).exists()
    failed.close()
    assert not (tmp_path / heartbeat.STARTING).exists()


def test_what_got_further_is_told_in_a_phase(tmp_path: Path, clock: Clock) -> None:
    record = RunRecord()
    record.open(tmp_path)
    with record.phase("quantize"):
        tell = record.progress("quantize", "matrices")
        for done in range(3):
            clock.now += 31
            record.beat()
            tell(done, 3)
    assert signs(tmp_path) == [("quantize", 31.0)] * 3
    assert isinstance(written(tmp_path)[-1], Phase)


def test_the_thread_calls_until_it_is_stopped() -> None:
    called = threading.Semaphore(0)

    def beat() -> float:
        called.release()
        return 0.001

    thread = heartbeat.HeartbeatThread(beat)
    for _ in range(3):
        assert called.acquire(timeout=30)
    thread.stop()
    assert not thread._thread.is_alive()


def test_lines_of_two_threads_stay_whole(tmp_path: Path) -> None:
    """On a file that writes a line in two pieces, and lets another thread have its turn between."""
    log = EventLog(tmp_path)
    real = log._file

    class InPieces:
        def write(self, text: str) -> None:
            real.write(text[:9])
            real.flush()
            time.sleep(0.0005)
            real.write(text[9:])

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    log._file = InPieces()  # type: ignore[assignment]

    def write(text: str) -> None:
        for number in range(40):
            log.write(Record(float(number), Warned(text, number)))

    threads = [threading.Thread(target=write, args=(name * 30,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    events = written(tmp_path)
    assert len(events) == 80
    for name in "ab":
        mine = [e.step for e in events if isinstance(e, Warned) and e.text == name * 30]
        assert mine == list(range(40))


def test_a_report_passes_over_them(tmp_path: Path) -> None:
    plain, beating = write_run(tmp_path / "plain"), write_run(tmp_path / "beating")
    last = list(read_events(beating))[-1]
    with EventLog(beating) as log:
        log.write(Record(last.time + 900, Heartbeat("step 121", 900.0, 12.0)))
    one, other = read_story(plain), read_story(beating)
    assert other.working_seconds == one.working_seconds
    assert (other.steps, other.processes[0].end) == (one.steps, one.processes[0].end)
