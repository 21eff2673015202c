"""What a person sees of a run: a listener of its events.

On a terminal the phases, the data, the model and the choices are laid out once, then a bar moves
below the logged lines. Anywhere else (a pipe, a log, a notebook) the same words come as plain
lines without control codes, one each ``logging_steps``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from halfbyte.cli.blocks import (
    Block,
    audit_block,
    back_text,
    check_text,
    choice_value,
    early_text,
    evaluation_text,
    finding_block,
    funnel_block,
    model_block,
    noticed_block,
    resolved_block,
    sample_text,
)
from halfbyte.cli.meter import Meter
from halfbyte.cli.units import duration_text, rate_text, visible
from halfbyte.events import read_events
from halfbyte.events.types import (
    Audited,
    Changed,
    Checked,
    Choice,
    Diverged,
    Evaluated,
    Event,
    Fallback,
    Finished,
    Found,
    Funnel,
    Interrupted,
    Kept,
    Mirrored,
    ModelLoaded,
    Noticed,
    Phase,
    PhaseProgress,
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

if TYPE_CHECKING:
    from halfbyte.cli.bar import Bar

LABEL_WIDTH = 10


def make_console() -> Console:
    """A console on standard output that takes text as it is: no markup, no guessed colours."""
    console = Console(highlight=False, markup=False, emoji=False, force_jupyter=False)
    if not console.is_terminal:
        console.no_color = True
    return console


class Display:
    """Shows events; give it to ``train(listeners=[…])`` and call ``close`` at the end.

    ``logging_steps`` is the recipe's: a logged loss is the mean of so many steps.
    """

    def __init__(self, console: Console | None = None, *, logging_steps: int = 10) -> None:
        self.console = console or make_console()
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self.colour = self.live and not self.console.no_color
        self.logging_steps = logging_steps
        self.folder: Path | None = None  # of the run, once it is known
        self.meter: Meter | None = None
        self._bar: Bar | None = None
        self._choices: list[Choice] = []
        self._phase: str | None = None  # running now, shown on an unfinished line
        self._phase_began = 0.0
        self._reached = ""  # how far it is
        self._base_loss: float | None = None
        self._earlier: list[float] = []  # losses of the window that a resumed run goes on with
        self._done = 0

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Choice):
            self._flush_choices()
        match event:
            case RunStarted():
                self._run_started(event)
            case PhaseStarted(name):
                self._begin_phase(name)
            case PhaseProgress():
                self._progress(event)
            case Phase(name, seconds):
                self._end_phase(name, seconds)
            case Funnel():
                self.block(funnel_block(event, cut=self.live))
            case Audited():
                self._audit(event)
            case Choice():
                self._choices.append(event)
            case Warned(text, step):
                where = f"step {step:,}: " if step is not None else ""
                self.block(Block("warning", [where + text]), "bold yellow")
            case Found():
                block, style = finding_block(event)
                self.block(block, style)
            case Fallback(what, reason):
                self.block(Block("fallback", [f"{what}: {reason}"]), "bold yellow")
            case ModelLoaded():
                self.block(model_block(event))
            case TrainingStarted():
                self._training_started(event)
            case Step():
                self._step(event)
            case Evaluated():
                self._evaluated(event)
            case Noticed() if event.action != "stop":  # that ends the command with this sentence
                block, style = noticed_block(event)
                self.block(block, style)
            case RolledBack():
                self._rolled_back(event)
            case RateLowered(_, first, factor):
                self.line(f"the learning rate is multiplied by {factor:g} from step {first:,} on")
            case StoppedEarly():
                self.line(early_text(event), "bold")
            case StopAsked():
                self._stop_asked()
            case Checked():
                self.line(check_text(event), "green" if event.passed else "bold red")
            case Kept():
                self._stop_bar()
            case Mirrored(None, where):
                self.line(f"copied to {where}: the adapter and the report")
            case Changed():
                self.line(f"changed: {event.key} {event.before} → {event.now}")
            case Finished() | Interrupted() | Diverged():
                self._stop_bar()
                self._begin_phase("report")
            case _:
                pass

    def close(self) -> None:
        """Leave the terminal as it was; says what has been held back."""
        self._stop_bar()
        self._flush_choices()
        self._clear_phase()
        self._phase = None

    def flush(self) -> None:
        """Say the choices that were held back to be laid out together."""
        self._flush_choices()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows a phase of the command's own, which the run's record knows nothing of."""
        began = time.perf_counter()
        self._begin_phase(name)
        yield
        self._end_phase(name, time.perf_counter() - began)

    # What is printed, laid out for a terminal or plain.

    def line(self, text: str | Text = "", style: str = "") -> None:
        """One line, never broken where there is no terminal."""
        self._clear_phase()
        shown = Text(visible(text), style) if isinstance(text, str) else text
        self.console.print(shown, soft_wrap=not self.live)
        self._show_phase()

    def block(self, block: Block, label_style: str = "bold") -> None:
        """A label and its lines."""
        if not self.live:
            for line in block.lines:
                self.line(f"{block.label}: {line}")
            return
        self._clear_phase()
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=LABEL_WIDTH, no_wrap=True)
        table.add_column(overflow="fold")
        for number, text in enumerate(block.lines):
            label = Text("" if number else block.label, label_style)
            table.add_row(label, Text(visible(text)) if isinstance(text, str) else text)
        self.console.print(table)
        self._show_phase()

    def whole_line(self, label: str, text: str) -> None:
        """A label and a path or command that must be copied whole: never broken by us."""
        self._clear_phase()
        text = visible(text)
        shown = Text.assemble((f"{label:<{LABEL_WIDTH}}  ", "bold"), text)
        self.console.print(shown if self.live else Text(f"{label}: {text}"), soft_wrap=True)
        self._show_phase()

    # Before step 1.

    def _run_started(self, event: RunStarted) -> None:
        self.folder = Path(event.folder)
        self.whole_line("run folder", event.folder)
        if event.resumed_from is not None:
            self._done = event.resumed_from
            if event.resumed_from:
                self.line(f"going on from the checkpoint of step {event.resumed_from:,}")
            else:
                self.line("no checkpoint was finished: beginning again at step 1")
            self._earlier = self._losses_up_to(self._done)

    def _losses_up_to(self, done: int) -> list[float]:
        """Losses of the steps before ``done`` that the next logged loss is a mean of as well."""
        start = done - done % self.logging_steps
        losses = {
            record.event.step: record.event.loss
            for record in read_events(self.folder or Path())
            if isinstance(record.event, Step)
            and start < record.event.step <= done
            and not record.event.left_out
        }
        return list(losses.values())

    def _begin_phase(self, name: str) -> None:
        self._clear_phase()
        self._phase, self._reached = name, ""
        self._phase_began = time.perf_counter()
        self._show_phase()

    def _progress(self, event: PhaseProgress) -> None:
        """How far the phase is, and how long it still takes."""
        if event.name != self._phase:
            return
        took = time.perf_counter() - self._phase_began
        left = took * (event.total - event.done) / event.done
        self._clear_phase()
        share = event.done / event.total
        self._reached = f"{share:4.0%} of {event.total:,} {event.of}, {duration_text(left)} left"
        self._show_phase()

    def _end_phase(self, name: str, seconds: float) -> None:
        self._clear_phase()
        self._phase = None
        took = duration_text(seconds)
        if self.live:
            self.console.print(Text.assemble((f"{name:<{LABEL_WIDTH}}  ", "dim"), (took, "dim")))
        else:
            self.line(f"phase {name}: {took}")

    def _show_phase(self) -> None:
        if self._phase is not None and self.live and self._bar is None:
            shown = f"{self._phase:<{LABEL_WIDTH}}  {self._reached or '…'}"
            self.console.print(Text(shown, "dim"), end="")
            self.console.file.flush()

    def _clear_phase(self) -> None:
        if self._phase is not None and self.live and self._bar is None:
            self.console.file.write("\r\x1b[2K")

    def _audit(self, audit: Audited) -> None:
        self.block(audit_block(audit))
        if not audit.sample:
            return
        sample = sample_text(audit, colour=self.colour)
        if self.live:
            self._clear_phase()
            self.console.print(Padding(sample, (0, 0, 0, LABEL_WIDTH + 2)))
            self._show_phase()
        else:
            for line in sample.plain.split("\n"):
                self.line(f"sample: {line}")

    def _flush_choices(self) -> None:
        choices, self._choices = self._choices, []
        if not choices:
            return
        if not self.live:
            for choice in choices:
                self.line(f"chosen: {choice.key} = {choice_value(choice)}: {choice.reason}")
            return
        self._clear_phase()
        # Whole keys, as --set takes them; in columns they would leave no room for the reasons.
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=LABEL_WIDTH, no_wrap=True)
        table.add_column(overflow="fold")
        for number, choice in enumerate(choices):
            text = Text.assemble(
                (f"{choice.key}=", "cyan"),
                (visible(choice_value(choice)), "bold cyan"),
                (f"  {visible(choice.reason)}", "dim"),
            )
            table.add_row(Text("" if number else "chosen", "bold"), text)
        self.console.print(table)
        self._show_phase()

    # The steps.

    def _training_started(self, event: TrainingStarted) -> None:
        from halfbyte.cli.bar import Bar

        self.block(resolved_block(event))
        self.line()
        self.meter = Meter(event, self.logging_steps, self._done)
        self.meter.seed(self._earlier)
        if self.live:
            self._bar = Bar(self.console, self.meter)
            self._bar.start()

    def _step(self, step: Step) -> None:
        meter = self.meter
        if meter is None:
            return
        meter.take(step)
        scaled = meter.started.precision == "fp16"
        if step.skipped and scaled and not step.left_out:  # elsewhere a warning follows
            what = "its gradient overflowed fp16, so the loss scale is lowered"
            self.line(f"step {step.step:,} made no update: {what}", "yellow")
        if meter.is_logging_step:
            steps = meter.started.steps
            self.line(
                f"step {step.step:>{len(str(steps))}}/{steps}  epoch {step.epoch:.2f}  "
                f"loss {meter.pop_logged():.4f}  rate {step.learning_rate:.2e}  "
                f"{rate_text(meter.tokens_per_second)}"
            )

    def _evaluated(self, event: Evaluated) -> None:
        if event.what == "quantized base":
            self._base_loss = event.loss
        self.line(evaluation_text(event, self._base_loss), "cyan")

    def _rolled_back(self, event: RolledBack) -> None:
        self.line(back_text(event), "bold")
        if self.meter is not None and event.to < event.step:
            self.meter.go_back(event.to, self._losses_up_to(event.to))

    def _stop_asked(self) -> None:
        # Called inside a signal handler: on a terminal the bar says it at its next refresh.
        if self._bar is not None:
            self._bar.stopping = True
            return
        self.line("finishing this step, then saving a checkpoint; Ctrl-C again stops at once")

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
