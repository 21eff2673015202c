"""What a run does about what was noticed, as its recipe says: stop, lower the rate, go back.

A step is judged when it has been read, which on a GPU is up to ``lag`` steps after it was started.
A lower rate therefore holds from the step after those, always the same one; going back drops them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from halfbyte.errors import RunError
from halfbyte.events.types import Noticed, RateLowered, RolledBack
from halfbyte.loop.steps import FinishedStep
from halfbyte.recipe import Recipe
from halfbyte.run.divergence import SkippedSteps
from halfbyte.run.record import RunRecord
from halfbyte.watching.early_stopping import EarlyStopping
from halfbyte.watching.interventions import Interventions
from halfbyte.watching.noticing import Noticing


class GoBackError(Exception):
    """Ends the loop: the run goes on from the last checkpoint, without the batch of ``step``."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(f"back, without the batch of step {step}")
        self.step, self.why = step, why


class Reactions:
    """Takes each finished step and each held-out loss.

    ``sources`` gives the number of the source of each of a step's rows, and ``stop`` ends the run:
    it is given what is to be recorded and said, and whether the step's update was made.
    """

    def __init__(
        self,
        recipe: Recipe,
        noticing: Noticing,
        skipped: SkippedSteps,
        record: RunRecord,
        *,
        lag: int,
        sources: Callable[[FinishedStep], list[int]],
        stop: Callable[[Noticed, bool, str], NoReturn],
    ) -> None:
        self.recipe = recipe.watch
        self.noticing, self.skipped, self.record = noticing, skipped, record
        self.early = EarlyStopping(recipe.evaluation.early_stopping)
        self.interventions = Interventions()
        self._lag, self._sources, self._stop = lag, sources, stop

    @property
    def may_go_back(self) -> bool:
        """Whether a checkpoint may be wanted before the first is written."""
        return "rollback" in (self.recipe.loss_spike, self.recipe.loss_not_finite)

    def step(self, step: FinishedStep) -> None:
        """Judge ``step``. Raises what ``stop`` raises, or GoBackError."""
        if self.interventions.leaves_out(step.number):
            self.skipped.pass_over()
            return
        reason = self.skipped.note(step)
        for noticed in self.noticing.step(step, reason):
            if self.skipped.exhausted:
                noticed = replace(noticed, action="stop")
            self._act(replace(noticed, sources=self._sources(step)), step)

    def evaluation(self, step: int, loss: float) -> None:
        """Judge the held-out ``loss`` of the adapter. Raises what ``stop`` raises."""
        early = self.early.take(step, loss)
        for noticed in self.noticing.evaluation(step, loss):
            self._act(noticed, None)
        if early is not None:
            self.record(early)

    def _act(self, noticed: Noticed, step: FinishedStep | None) -> None:
        self.record(noticed)
        updated = step is None or step.updated
        if noticed.action == "stop":
            self._stop(noticed, updated, "")
        if noticed.action == "lower_rate":
            first, factor = noticed.step + 1 + self._lag, self.recipe.rate_factor
            self.interventions.lower_rate(noticed.step, noticed.name, first, factor)
            self.record(RateLowered(noticed.step, first, factor, noticed.name))
        if noticed.action == "rollback":
            most = self.recipe.max_rollbacks
            if self.interventions.left_out >= most:
                batches = "one batch has" if most == 1 else f"{most:,} batches have"
                limit = f"{batches} been left out already, which is watch.max_rollbacks"
                self._stop(noticed, updated, limit)
            self.interventions.leave_out(noticed.step, noticed.name)
            # With a loss scale even a step without an update leaves something behind.
            if updated or self.skipped.scaler.enabled:
                raise GoBackError(noticed.step, noticed.name)
            self.skipped.forgive()
            self.record(RolledBack(noticed.step, noticed.step, noticed.name))

    def state(self) -> dict[str, Any]:
        """What ``go_on_from`` takes beside the interventions, as JSON has it."""
        return {
            "noticing": self.noticing.state(),
            "early_stopping": self.early.state(),
            "skipped_in_a_row": self.skipped.in_a_row,
        }

    def go_on_from(self, interventions: list[dict[str, Any]], state: dict[str, Any]) -> None:
        """Go on with what a checkpoint holds. Raises RunError where that cannot be."""
        try:
            self.interventions = Interventions.from_plain(interventions)
            self.noticing.load_state(state["noticing"])
            self.early.load_state(state["early_stopping"])
            self.skipped.in_a_row = int(state["skipped_in_a_row"])
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise RunError(
                "the checkpoint's record of what was watched cannot be read "
                f"({type(error).__name__}: {error}); remove that checkpoint's folder to go on from "
                "the one before it."
            ) from error
