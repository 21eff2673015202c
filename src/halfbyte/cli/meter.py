"""The figures of a running training: means, rates and the time that is left."""

from __future__ import annotations

import math
import time
from collections import deque

from halfbyte.events.types import Step, TrainingStarted

# The smoothed loss is an exponential mean with this weight on the past (about ten steps).
SMOOTHING = 0.9
# tokens/s is over so many steps: long enough to be calm, short enough to show a change.
RATE_STEPS = 20


class Meter:
    """Takes each step and knows what to show.

    ``logged`` is the mean loss since the last logged step, as the report's table has it.
    """

    def __init__(self, started: TrainingStarted, logging_steps: int, done: int = 0) -> None:
        self.started = started
        self.logging_steps = logging_steps
        self.last: Step | None = None
        self.done = done  # steps finished, those of an earlier process among them
        self._first = done
        self._smooth = 0.0
        self._weight = 0.0
        self._window: list[float] = []
        self._recent: deque[Step] = deque(maxlen=RATE_STEPS)
        self._began = time.time()

    def seed(self, losses: list[float]) -> None:
        """Losses of an earlier process that belong to the window of the next logged step."""
        self._window = list(losses)

    def go_back(self, done: int, losses: list[float]) -> None:
        """Steps after ``done`` are made again; ``losses`` as in ``seed``."""
        self.done = done
        self.seed(losses)

    def take(self, step: Step) -> None:
        """Count ``step``."""
        if not self._recent:  # evaluations before the first step tell nothing of the rest
            self._began = time.time() - step.seconds
        self.last = step
        self.done = step.step
        if math.isfinite(step.loss) or not step.skipped:
            self._window.append(step.loss)
        self._recent.append(step)
        if math.isfinite(step.loss):
            self._smooth = SMOOTHING * self._smooth + (1 - SMOOTHING) * step.loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)

    @property
    def smoothed(self) -> float:
        """Exponential mean of the loss, without the pull of its start at zero."""
        return self._smooth / self._weight if self._weight else math.nan

    @property
    def tokens_per_second(self) -> float:
        seconds = sum(step.seconds for step in self._recent)
        return sum(step.tokens for step in self._recent) / seconds if seconds else 0.0

    @property
    def is_logging_step(self) -> bool:
        return self.done % self.logging_steps == 0 or self.done == self.started.steps

    def pop_logged(self) -> float:
        """The mean loss since the last logged step; begins the next window."""
        mean = sum(self._window) / len(self._window) if self._window else math.nan
        self._window.clear()
        return mean

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far, evaluations and checkpoints counted; None before a step is done."""
        finished = self.done - self._first
        if not finished:
            return None
        return (time.time() - self._began) / finished * (self.started.steps - self.done)
