"""What is said of a run when it ends: figures, and one line for people."""

from __future__ import annotations

import time
from typing import Any

import halfbyte
from halfbyte.events.types import Evaluated, Event, RunStarted, Step, TrainingStarted


class Outcome:
    """Remembers of the events what their end is told with."""

    def __init__(self) -> None:
        self.run = ""
        self.resumed_from: int | None = None
        self._began = time.time()
        self._planned = self._step = 0
        self._loss: float | None = None
        self._base: float | None = None
        self._held_out: list[float] = []

    def note(self, event: Event) -> None:
        match event:
            case RunStarted():
                self.resumed_from = event.resumed_from
            case TrainingStarted():
                self._planned = event.steps
            case Step():
                self._step, self._loss = event.step, event.loss
            case Evaluated(what="adapter"):
                self._held_out.append(event.loss)
            case Evaluated(what="quantized base"):
                self._base = event.loss

    def message(self, outcome: str, reason: str) -> dict[str, Any]:
        """The end as trackers are told of it: all that a webhook posts."""
        seconds = round(time.time() - self._began, 1)
        return {
            "text": self._sentence(outcome, reason, seconds),
            "run": self.run,
            "outcome": outcome,
            "reason": reason,
            "step": self._step,
            "steps": self._planned,
            "loss": self._loss,
            "held_out_loss_before": self._base,
            "held_out_loss": self._held_out[-1] if self._held_out else None,
            "held_out_loss_lowest": min(self._held_out, default=None),
            "seconds": seconds,
            "halfbyte": halfbyte.__version__,
        }

    def _sentence(self, outcome: str, reason: str, seconds: float) -> str:
        losses = ""
        if self._held_out:
            before = "" if self._base is None else f"{self._base:.3f} → "
            losses = f", held-out loss {before}{self._held_out[-1]:.3f}"
        elif self._loss is not None:
            losses = f", loss {self._loss:.3f}"
        why = f" ({reason})" if reason else ""
        minutes, rest = divmod(round(seconds), 60)
        took = f"{minutes:,} min {rest} s" if minutes else f"{rest} s"
        steps = f"after step {self._step:,} of {self._planned:,}"
        return f"halfbyte run {self.run} {outcome} {steps}{why}{losses}; {took}"
