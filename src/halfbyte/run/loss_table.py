"""A table of losses that grows in a notebook while a run trains."""

from __future__ import annotations

import html
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from halfbyte.events.types import (
    Checked,
    Diverged,
    Evaluated,
    Event,
    Fallback,
    Finished,
    Found,
    Interrupted,
    Kept,
    Noticed,
    Phase,
    PhaseStarted,
    RateLowered,
    RolledBack,
    RunStarted,
    Step,
    StopAsked,
    StoppedEarly,
    TrainingStarted,
    Warned,
)
from halfbyte.recipe import Recipe

# A browser redraws the whole table at each update, and a fast GPU does a hundred steps a second.
SECONDS_BETWEEN_UPDATES = 0.5
# tokens/s is over so many steps.
RATE_STEPS = 20

_CELL = "padding:2px 14px;text-align:right"
_NOTE = "margin:4px 0;opacity:.75"


@dataclass
class Line:
    """One line of the table: a logged step, a held-out loss, or both."""

    step: int
    epoch: float | None = None
    training: float | None = None  # mean of the steps since the last logged one
    held_out: float | None = None
    rate: float | None = None  # learning rate


@dataclass
class Losses:
    """What the events have said so far, apart from how it is shown."""

    logging_steps: int
    started: TrainingStarted | None = None
    last: Step | None = None
    status: str = "starting"
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _window: list[float] = field(default_factory=list)
    _recent: deque[Step] = field(default_factory=lambda: deque(maxlen=RATE_STEPS))

    def take(self, event: Event) -> str | None:
        """Note ``event``; returns what a plain output should print of it, if anything."""
        match event:
            case RunStarted(folder=folder):
                return self._note(f"run folder: {folder}")
            case PhaseStarted(name):
                self.status = name
            case Phase(name, seconds):
                return f"{name}: {seconds:.1f} s"
            case Warned(text):
                return self._note(f"warning: {text}")
            case Found(severity=severity) if severity != "note":
                return self._note(f"{severity}: {event.sentence}")
            case Fallback(what, reason):
                return self._note(f"fallback: {what}: {reason}")
            case TrainingStarted():
                self.started, self.status = event, "training"
                return (
                    f"{event.steps:,} steps, {event.epochs:.3g} epochs of {event.rows:,} rows, "
                    f"{event.device}, {event.precision}"
                )
            case Step():
                return self._step(event)
            case Evaluated():
                return self._evaluated(event)
            case Noticed(severity=severity) if event.action != "stop":
                return self._note(f"{severity}: {event.sentence}")
            case RolledBack():
                return self._rolled_back(event)
            case RateLowered(_, first, factor):
                return self._note(f"rate: multiplied by {factor:g} from step {first:,} on")
            case StoppedEarly(step):
                return self._note(f"ending early after step {step:,}: no new lowest held-out loss")
            case StopAsked():
                self.status = "finishing this step, then saving a checkpoint"
                return self.status
            case Kept(step, why):
                return self._note(f"kept: the adapter of step {step:,}, {why}")
            case Checked(name, passed, detail) if not passed:
                return self._note(f"FAILED: {name} ({detail})")
            case Interrupted(step):
                self.status = f"stopped after step {step:,}"
                return self.status
            case Diverged(_, reason):
                self.status = f"stopped: {reason}"
                return self.status
            case Finished(step, seconds):
                self.status = f"finished {step:,} steps in {seconds:,.0f} s"
                return self.status
        return None

    @property
    def tokens_per_second(self) -> float:
        seconds = sum(step.seconds for step in self._recent)
        return sum(step.tokens for step in self._recent) / seconds if seconds else 0.0

    def _note(self, text: str) -> str:
        self.notes.append(text)
        return text

    def _rolled_back(self, event: RolledBack) -> str:
        if event.to < event.step:
            self.lines = [line for line in self.lines if line.step <= event.to]
            self._window.clear()
        back = "" if event.to == event.step else f"back to step {event.to:,}: "
        return self._note(f"{back}the batch of step {event.step:,} is left out")

    def _step(self, step: Step) -> str | None:
        self.last = step
        if math.isfinite(step.loss) or not step.skipped:
            self._window.append(step.loss)
        self._recent.append(step)
        ends = self.started is not None and step.step == self.started.steps
        if step.step % self.logging_steps and not ends:
            return None
        mean = sum(self._window) / len(self._window) if self._window else math.nan
        self._window.clear()
        self.lines.append(Line(step.step, step.epoch, mean, None, step.learning_rate))
        return (
            f"step {step.step:,}  epoch {step.epoch:.2f}  loss {mean:.4f}  "
            f"{self.tokens_per_second:,.0f} tokens/s"
        )

    def _evaluated(self, event: Evaluated) -> str:
        if event.what == "base":  # measured at the end, about the start
            return self._note(f"held-out loss of the base before quantization: {event.loss:.4f}")
        if not self.lines or self.lines[-1].step != event.step:
            epoch = self.last.epoch if self.last is not None else 0.0
            self.lines.append(Line(event.step, epoch))
        self.lines[-1].held_out = event.loss
        return f"held-out loss at step {event.step:,}: {event.loss:.4f} ({event.what})"


class LossTable:
    """A listener for ``train(recipe, listeners=[LossTable(recipe)])``.

    In a notebook one table is shown and updated in its place. Elsewhere, and with ``plain=True``,
    each logged loss is a line of text.
    """

    def __init__(self, recipe: Recipe, *, plain: bool | None = None) -> None:
        self.losses = Losses(recipe.training.logging_steps)
        self._display = None if plain or (plain is None and not in_notebook()) else _displayer()
        self._shown = 0.0

    def __call__(self, event: Event) -> None:
        seen = (len(self.losses.lines), len(self.losses.notes), self.losses.status)
        said = self.losses.take(event)
        if self._display is None:
            if said is not None:
                print(said, flush=True)
            return
        changed = seen != (len(self.losses.lines), len(self.losses.notes), self.losses.status)
        changed = changed or isinstance(event, Evaluated)
        if changed or time.monotonic() - self._shown > SECONDS_BETWEEN_UPDATES:
            self._shown = time.monotonic()
            self._display(table_html(self.losses))


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, Colab's or Jupyter's."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def _displayer() -> Callable[[str], None]:
    """A function that shows HTML, each time in the place of what it showed before."""
    ipython: Any = import_module("IPython.display")
    handle = ipython.display(ipython.HTML(""), display_id=True)
    return lambda text: handle.update(ipython.HTML(text))


def table_html(losses: Losses) -> str:
    """The table as HTML; it takes its colours from the notebook, light or dark."""
    heads = "".join(
        f'<th style="{_CELL}">{name}</th>'
        for name in ("step", "epoch", "training loss", "held-out loss", "learning rate")
    )
    measured = [line.held_out for line in losses.lines if line.held_out is not None]
    lowest = min(measured, default=None)
    body = "".join(_row_html(line, lowest) for line in losses.lines)
    notes = "".join(f'<p style="{_NOTE}">{html.escape(note)}</p>' for note in losses.notes)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>" if body else ""
    return f"<div>{_progress_html(losses)}{table}{notes}</div>"


def _progress_html(losses: Losses) -> str:
    status = html.escape(losses.status)
    if losses.started is None or losses.last is None:
        return f"<p>{status} …</p>"
    done, steps = losses.last.step, losses.started.steps
    text = f"step {done:,} of {steps:,}, {losses.tokens_per_second:,.0f} tokens/s"
    return f'<p><progress value="{done}" max="{steps}"></progress> {text}; {status}</p>'


def _row_html(line: Line, lowest: float | None) -> str:
    held_out = _figure(line.held_out, ".4f")
    if line.held_out is not None and line.held_out == lowest:
        held_out = f"<b>{held_out}</b>"
    cells = (
        f"{line.step:,}",
        _figure(line.epoch, ".2f"),
        _figure(line.training, ".4f"),
        held_out,
        _figure(line.rate, ".2e"),
    )
    return "<tr>" + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in cells) + "</tr>"


def _figure(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return format(value, form) if math.isfinite(value) else str(value)
