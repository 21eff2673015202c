"""The loop: steps in order, and what happens between them given as callables.

A device works on a step while the host prepares the next ones; reading a value makes the host
wait for all that was queued before it. So results are read a few steps late, unless what follows
needs the weights of the very step that it is called with.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from halfbyte.data.batch import Batch


class PendingStep(Protocol):
    """A step whose values may still be on their way from the device."""

    def read(self) -> tuple[float, float, bool]:
        """Loss, gradient norm and whether an update was made; waits until they are there."""
        ...

    def seconds(self) -> float | None:
        """Once read: device seconds from the end of the step before to the end of this one.

        None where the host's clock is to be used.
        """
        ...


@dataclass(frozen=True)
class FinishedStep:
    """A step whose values have been read back."""

    number: int
    loss: float
    grad_norm: float
    updated: bool
    tokens: int
    labels: int
    seconds: float
    rows: tuple[int, ...]  # numbers in the source, from 0, of the rows of all its micro-batches


class _Queue:
    """Steps that were started and not read yet, the earliest first."""

    def __init__(self, after: Sequence[Callable[[FinishedStep], None]]) -> None:
        self.after = after
        self.steps: deque[tuple[int, list[Batch], float, PendingStep]] = deque()
        self.last_read = 0.0

    def read_down_to(self, left: int) -> None:
        """Read the earliest steps until ``left`` are unread."""
        while len(self.steps) > left:
            # A step's batches are kept until here: what went wrong in it may lie in its rows.
            number, micro_batches, began, pending = self.steps.popleft()
            loss, grad_norm, updated = pending.read()
            # With a lag, from its start on a step also waited for those before it: its own time
            # is what passed since they were read.
            now = time.perf_counter()
            seconds = pending.seconds()
            # The device may have been idle, or evaluating, between two steps: no step takes
            # longer than from its start on the host.
            seconds = now - max(began, self.last_read) if seconds is None else seconds
            seconds = min(seconds, now - began)
            self.last_read = now
            finished = FinishedStep(
                number=number,
                loss=loss,
                grad_norm=grad_norm,
                updated=updated,
                tokens=sum(batch.num_tokens for batch in micro_batches),
                labels=sum(batch.num_labels for batch in micro_batches),
                seconds=seconds,
                rows=tuple(row for batch in micro_batches for row in batch.rows),
            )
            for call in self.after:
                call(finished)


def run_steps(
    step: Callable[[int, Sequence[Batch]], PendingStep],
    batches: Callable[[int], list[Batch]],
    *,
    first: int,
    last: int,
    after: Sequence[Callable[[FinishedStep], None]],
    stop: Callable[[], bool],
    lag: int = 0,
    needs_state: Callable[[int], bool] = lambda number: False,
) -> int:
    """Run steps ``first`` … ``last``; returns the last one finished.

    ``batches(n)`` gives the micro-batches of step n. Every callable of ``after`` is called with
    each step's values, in order of the steps, at most ``lag`` steps after the step was started.
    Where ``needs_state(n)`` is true, and after the last step, that happens before another step is
    started, so that the callables see the weights of step n. After each start ``stop()`` is asked
    whether to end there; everything started is then read first.

    An exception, also one out of ``after``, ends the loop; steps not read by then are dropped.
    """
    queue = _Queue(after)
    for number in range(first, last + 1):
        began = time.perf_counter()
        micro_batches = batches(number)
        queue.steps.append((number, micro_batches, began, step(number, micro_batches)))
        queue.read_down_to(0 if number == last or needs_state(number) else lag)
        if stop():
            queue.read_down_to(0)
            return number
    return last
