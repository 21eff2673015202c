"""The loop reads results late, in order, and never later than what follows can bear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data.batch import Batch, TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.loop.steps import FinishedStep, run_steps


def one_row(number: int) -> Batch:
    """A row of ``number`` + 1 tokens, row ``number`` of the source, padded by 3."""
    length = number + 1
    row = TokenizedRow(np.zeros(length, np.int32), np.ones(length, bool), number)
    return make_batch([row], tokens=length + 3)


@dataclass
class Device:
    """Writes down what is started ("start"), read ("read") and told ("tell"), in order."""

    took: float | None = None
    happened: list[tuple[str, int]] = field(default_factory=list)
    fail_at: int | None = None
    fail_in: str = ""

    def note(self, what: str, number: int) -> None:
        if (what, number) == (self.fail_in, self.fail_at):
            raise RuntimeError(f"{what} {number}")
        self.happened.append((what, number))

    def step(self, number: int, micro_batches: Sequence[Batch]) -> Pending:
        self.note("start", number)
        return Pending(self, number)

    def tell(self, finished: FinishedStep) -> None:
        self.note("tell", finished.number)

    def numbers(self, what: str) -> list[int]:
        return [number for done, number in self.happened if done == what]


@dataclass
class Pending:
    device: Device
    number: int

    def read(self) -> tuple[float, float, bool]:
        self.device.note("read", self.number)
        return self.number / 2, self.number / 4, self.number % 3 != 0

    def seconds(self) -> float | None:
        assert ("read", self.number) in self.device.happened
        return self.device.took


def run(
    device: Device,
    *,
    first: int = 1,
    last: int = 10,
    lag: int = 0,
    needs: Callable[[int], bool] = lambda number: False,
    stop: Callable[[], bool] = lambda: False,
    more: Sequence[Callable[[FinishedStep], None]] = (),
) -> int:
    return run_steps(
        device.step,
        lambda number: [one_row(number), one_row(100 + number)],
        first=first,
        last=last,
        after=[device.tell, *more],
        stop=stop,
        lag=lag,
        needs_state=needs,
    )


@settings(deadline=None)
@given(
    first=st.integers(1, 5),
    count=st.integers(1, 25),
    lag=st.integers(0, 9),
    needing=st.sets(st.integers(1, 30)),
    stop_at=st.none() | st.integers(1, 30),
)
def test_results_come_in_order_late_and_not_too_late(
    first: int, count: int, lag: int, needing: set[int], stop_at: int | None
) -> None:
    device = Device()
    last = first + count - 1

    def stop() -> bool:
        return stop_at is not None and device.numbers("start")[-1] >= stop_at

    ended = run(
        device, first=first, last=last, lag=lag, needs=lambda number: number in needing, stop=stop
    )
    end = last if stop_at is None else min(last, max(first, stop_at))
    steps = list(range(first, end + 1))
    assert ended == end
    assert device.numbers("start") == device.numbers("read") == device.numbers("tell") == steps
    unread: list[int] = []
    waited = 0
    for at, (what, number) in enumerate(device.happened):
        if what == "start":
            # No step starts before one that needs the state has been told of.
            assert not needing & set(unread)
            unread.append(number)
        elif what == "read":
            assert device.happened[at + 1] == ("tell", number)
            # Nothing is read before it must be.
            started = unread[-1]
            assert started - number >= lag or started in {*needing, last, end}
            unread.remove(number)
        else:
            waited = max(waited, len(unread))
    assert waited <= lag
    assert unread == []


def test_without_a_lag_each_step_is_told_of_before_the_next_starts() -> None:
    device = Device()
    assert run(device, last=3) == 3
    assert device.happened == [(w, n) for n in (1, 2, 3) for w in ("start", "read", "tell")]


def test_a_step_is_told_with_its_values_and_rows() -> None:
    told: list[FinishedStep] = []
    run(Device(took=0.0), last=4, lag=3, more=[told.append])
    assert told[2] == FinishedStep(
        number=3,
        loss=1.5,
        grad_norm=0.75,
        updated=False,
        tokens=4 + 104,  # padding does not count
        labels=3 + 103,
        seconds=0.0,  # as the device says; the host has measured more
        rows=(3, 103),
    )
    assert [step.updated for step in told] == [True, True, False, True]


def test_a_stop_asked_for_while_a_step_is_told_of_ends_the_loop_there() -> None:
    device = Device()
    asked: list[int] = []

    def ask(finished: FinishedStep) -> None:
        if finished.number == 4:
            asked.append(finished.number)

    assert run(device, lag=2, stop=lambda: bool(asked), more=[ask]) == 6
    assert device.numbers("tell") == [1, 2, 3, 4, 5, 6]
    device, asked = Device(), []
    assert run(device, stop=lambda: bool(asked), more=[ask]) == 4


@pytest.mark.parametrize("what", ["start", "read", "tell"])
def test_nothing_happens_after_an_exception(what: str) -> None:
    device = Device(fail_in=what, fail_at=4)
    with pytest.raises(RuntimeError, match=f"{what} 4"):
        run(device, lag=2)
    told = [1] if what == "start" else [1, 2, 3]
    assert device.numbers("tell") == told
    assert device.numbers("start") == ([1, 2, 3] if what == "start" else [1, 2, 3, 4, 5, 6])


def test_host_seconds_add_up_to_no_more_than_the_run_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that a start moves by 1, a reading by 2 and a callable by 4."""
    device = Device()

    def clock() -> float:
        ticks = {"start": 1.0, "read": 2.0, "tell": 4.0}
        return sum(ticks[what] for what, _ in device.happened)

    monkeypatch.setattr("halfbyte.loop.steps.time.perf_counter", clock)
    told: list[FinishedStep] = []
    run(device, last=6, lag=2, more=[told.append], needs=lambda number: number == 3)
    # Step 1 from its start, over those of 2 and 3; then from reading to reading; step 4 from its
    # own start again, since the queue was empty before it.
    assert [step.seconds for step in told] == [5.0, 6.0, 6.0, 5.0, 6.0, 6.0]
    device, told = Device(), []
    run(device, last=3, more=[told.append])
    assert [step.seconds for step in told] == [3.0, 3.0, 3.0]
    # What the device measured holds, but for more than has passed since the step's start: what
    # lies between step 3, after which the queue is empty, and step 4 is no part of step 4.
    for took, of_4 in ((1.5, 1.5), (50.0, 5.0)):
        device, told = Device(took=took), []
        run(device, last=6, lag=2, more=[told.append], needs=lambda number: number == 3)
        assert told[3].seconds == of_4
