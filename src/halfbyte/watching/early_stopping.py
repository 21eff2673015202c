"""When a run ends before its last step, since its held-out loss falls no more."""

from __future__ import annotations

import math
from typing import Any

from halfbyte.events.types import StoppedEarly
from halfbyte.recipe.watch_schema import EarlyStoppingRecipe


class EarlyStopping:
    """Takes each held-out loss of the adapter; that of the base before step 1 does not count.

    ``stopped`` is the event of the evaluation after which the run is to end, once there is one.
    """

    def __init__(self, recipe: EarlyStoppingRecipe) -> None:
        self.recipe = recipe
        self.stopped: StoppedEarly | None = None
        self._best: tuple[int, float] | None = None  # step, loss
        self._without = 0  # evaluations in a row without a new lowest loss

    def take(self, step: int, loss: float) -> StoppedEarly | None:
        """Count the held-out ``loss`` after ``step``; returns the event if the run is to end."""
        patience = self.recipe.patience
        if patience is None:
            return None
        lowest = math.inf if self._best is None else self._best[1] - self.recipe.min_delta
        if loss < lowest:  # one that is no number is not
            self._best, self._without = (step, loss), 0
            return None
        self._without += 1
        if self._without < patience:
            return None
        best_step, best_loss = self._best or (None, None)
        self.stopped = StoppedEarly(step, patience, best_step, best_loss)
        return self.stopped

    def state(self) -> dict[str, Any]:
        """What ``load_state`` takes, as JSON has it."""
        return {
            "best": self._best,
            "without": self._without,
            "stopped": None if self.stopped is None else self.stopped.step,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, with whose patience it may have ended already."""
        best, stopped = state["best"], state["stopped"]
        self._best = None if best is None else (int(best[0]), float(best[1]))
        self._without = int(state["without"])
        self.stopped = None
        if stopped is not None and self.recipe.patience is not None:
            best_step, best_loss = self._best or (None, None)
            self.stopped = StoppedEarly(int(stopped), self.recipe.patience, best_step, best_loss)
