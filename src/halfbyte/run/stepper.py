"""The steps as the loop takes them: some are passed over, and the rates may be lower ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from halfbyte.data.batch import Batch
from halfbyte.data.batching import Batches
from halfbyte.loop.steps import PendingStep
from halfbyte.run.heartbeat import Work
from halfbyte.run.setup import Trainer
from halfbyte.watching.interventions import Interventions


class PassedOver:
    """A step that is not made."""

    def read(self) -> tuple[float, float, bool]:
        return math.nan, math.nan, False

    def seconds(self) -> float:
        return 0.0


class Stepper:
    """``batches(number)`` and ``take(number, micro_batches)`` for the loop.

    ``interventions`` gives those of the run as they are at the time. Nothing here depends on what
    was done before: the rates of a step are made from the schedule whenever others hold than in the
    step before, in the memory that captured steps read.
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: Batches,
        interventions: Callable[[], Interventions],
        work: Work,
    ) -> None:
        self._trainer, self._batches, self._interventions = trainer, batches, interventions
        self._work = work
        self.schedule = trainer.step.learning_rates.cpu().clone()  # without interventions
        self._factors: list[float] = []  # in the rates on the device

    def batches(self, number: int) -> list[Batch]:
        """The micro-batches of step ``number``; none where it is passed over."""
        self._work.mark(f"step {number:,}")
        return [] if self._interventions().leaves_out(number) else self._batches.step(number)

    def take(self, number: int, micro_batches: Sequence[Batch]) -> PendingStep:
        if self._interventions().leaves_out(number):
            return PassedOver()
        factors = self._interventions().factors(number)
        if factors != self._factors:
            # In the order of the stream: steps that were started before have read theirs by then.
            rates = self._interventions().rates(self.schedule, number)
            self._trainer.step.learning_rates.copy_(rates)
            self._factors = factors
        return self._trainer.take_step(number, micro_batches)
