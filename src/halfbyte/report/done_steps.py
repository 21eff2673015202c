"""What a record says was done step by step, once what was done again counts as done last."""

from __future__ import annotations

from typing import Any

from halfbyte.events.types import (
    Checkpointed,
    Evaluated,
    Event,
    Noticed,
    RateLowered,
    RolledBack,
    RunStarted,
    Step,
)


class DoneSteps:
    """Takes the events of a run in their order.

    A process that resumed the run, or went back to a checkpoint by itself, takes away what came
    after that checkpoint.
    """

    def __init__(self) -> None:
        self.repeated = 0  # steps that were done again
        self.noticed: list[Noticed] = []
        self.rolled_back: list[RolledBack] = []
        self.rates_lowered: list[RateLowered] = []
        self._steps: dict[int, Step] = {}
        self._evaluations: dict[int, Evaluated] = {}  # of the adapter
        self._checkpoints: dict[int, Checkpointed] = {}
        # What an earlier process said of steps that a later one does again.
        self._open: list[tuple[RolledBack, list[Noticed]]] = []

    @property
    def steps(self) -> list[Step]:
        return [self._steps[s] for s in sorted(self._steps)]

    @property
    def evaluations(self) -> list[Evaluated]:
        return [self._evaluations[s] for s in sorted(self._evaluations)]

    @property
    def checkpoints(self) -> list[Checkpointed]:
        return [self._checkpoints[s] for s in sorted(self._checkpoints)]

    def take(self, event: Event) -> None:
        match event:
            case RunStarted(resumed_from=start) if start is not None:
                self._go_back(start)
                self._reopen(start)
            case RolledBack():
                self._go_back(event.to)
                self.noticed = [e for e in self.noticed if not event.to < e.step < event.step]
                self.rolled_back.append(event)
            case Noticed():
                self.noticed.append(event)
            case RateLowered():
                self.rates_lowered.append(event)
            case Step():
                self._steps[event.step] = event
                if event.left_out:
                    self._hold(event.step)
            case Evaluated(what="adapter"):
                self._evaluations[event.step] = event
            case Checkpointed():
                self._checkpoints[event.step] = event
            case _:
                pass

    def _go_back(self, start: int) -> None:
        self.repeated += sum(step > start for step in self._steps)
        done: Any
        for done in (self._steps, self._evaluations, self._checkpoints):
            for step in [s for s in done if s > start]:
                del done[step]
        self.rates_lowered = [e for e in self.rates_lowered if e.step <= start]

    def _reopen(self, start: int) -> None:
        """A later process goes on from ``start``: it notices again what there is to notice, but a
        batch that its checkpoint leaves out already is passed over in silence."""
        for back in self.rolled_back:
            if back.step > start:
                why = [e for e in self.noticed if (e.step, e.name) == (back.step, back.why)]
                self._open.append((back, why[-1:]))
        self.noticed = [e for e in self.noticed if e.step <= start]
        self.rolled_back = [e for e in self.rolled_back if e.step <= start]

    def _hold(self, step: int) -> None:
        """The batch of ``step`` was left out: what an earlier process said of it holds."""
        said = [pair for pair in self._open if pair[0].step == step]
        if said and all(e.step != step for e in self.rolled_back):
            back, why = said[-1]
            self.rolled_back.append(back)
            self.noticed += why
