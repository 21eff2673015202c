"""The last words of a run: what was kept, how good it is, where it lies, what to type next."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from halfbyte.cli.blocks import Block, check_text
from halfbyte.cli.display import Display
from halfbyte.cli.units import bytes_text, duration_text, shortened, visible
from halfbyte.data.example import counted
from halfbyte.events import read_events
from halfbyte.events.types import (
    Answered,
    Artifact,
    Checked,
    Evaluated,
    Event,
    Finished,
    Kept,
    Step,
)

if TYPE_CHECKING:
    from halfbyte.run import Run

# A longer prompt or answer loses its middle here; the report has it whole.
ANSWER_LENGTH = 400


def show_finished(
    display: Display, run: Run, *, answers: int = 1, hints: Sequence[str] = ()
) -> None:
    """The end of a finished run, with so many of its held-out prompts before and after.

    ``hints`` are said after what can be typed next anyway.
    """
    events = [record.event for record in read_events(run.folder)]
    _show_answers(display, events, answers)
    display.block(Block("done", _done(events)), "bold green")
    failed = [e for e in _of_last_process(events) if isinstance(e, Checked) and not e.passed]
    if failed:
        display.block(Block("failed", [check_text(e) for e in failed]), "bold red")
    _show_paths(display, run)
    display.block(
        Block(
            "next",
            [
                f"halfbyte chat {shlex.quote(str(run.folder))}    talk to it",
                f"open {run.report} in a browser: what was done, and how well",
                *hints,
            ],
        )
    )


def show_interrupted(display: Display, run: Run) -> None:
    """The end of a run that was asked to stop, and how to go on."""
    display.block(
        Block(
            "stopped",
            [
                f"after step {run.step:,}; a checkpoint holds it, the report says what there is",
                f"report  {run.report}",
            ],
        ),
        "bold yellow",
    )
    display.whole_line("go on", resume_command(run.folder))


def show_stopped_at_once(display: Display, folder: Path | None) -> None:
    """The end of a run that was stopped outside its steps, or by a second Ctrl-C."""
    if folder is None or not folder.exists():
        display.block(Block("stopped", ["before step 1; nothing was written"]), "bold yellow")
    elif any((folder / "checkpoints").glob("step-*")):
        display.block(Block("stopped", ["the last checkpoint is whole"]), "bold yellow")
        display.whole_line("go on", resume_command(folder))
    else:
        text = f"before the first checkpoint; {folder} can be removed"
        display.block(Block("stopped", [text]), "bold yellow")


def resume_command(folder: Path) -> str:
    """What to type to go on with the run in ``folder``."""
    return f"halfbyte train --resume {shlex.quote(str(folder))}"


def _done(events: list[Event]) -> list[str]:
    last_step = max((e.step for e in events if isinstance(e, Step)), default=0)
    seconds = sum(e.seconds for e in events if isinstance(e, Finished))
    lines = [f"{last_step:,} steps in {duration_text(seconds)}, everything counted"]
    kept = next((e for e in reversed(events) if isinstance(e, Kept)), None)
    if kept is not None:
        lines.append(f"kept: the adapter of step {kept.step:,}, {kept.why}")
    lines += _losses([e for e in events if isinstance(e, Evaluated)], kept)
    checks = [e for e in _of_last_process(events) if isinstance(e, Checked)]
    passed = sum(e.passed for e in checks)
    if checks:
        lines.append(f"checks: {passed} of {len(checks)} passed")
    return lines


def _losses(evaluated: list[Evaluated], kept: Kept | None) -> list[str]:
    """Held-out losses in a line, and what the difference means."""
    last = {e.what: e.loss for e in evaluated}
    if kept is not None and kept.held_out_loss is not None:
        last["adapter"] = kept.held_out_loss
    known = [what for what in ("base", "quantized base", "adapter") if what in last]
    if not known:
        return ["held-out loss: not measured, no rows are held out"]
    lines = ["held-out loss: " + ", ".join(f"{what} {last[what]:.4f}" for what in known)]
    before = last.get("quantized base")
    after = last.get("adapter")
    if before is not None and after is not None and max(before, after) < 50:
        lines.append(
            f"perplexity {math.exp(before):,.1f} → {math.exp(after):,.1f}"
            + ("" if after < before else ": NO better than before training")
        )
    return lines


def _of_last_process(events: list[Event]) -> list[Event]:
    """The events from the last time that an adapter was kept."""
    starts = [i for i, e in enumerate(events) if isinstance(e, Kept)]
    return events[starts[-1] :] if starts else []


def _show_paths(display: Display, run: Run) -> None:
    sizes = {
        record.event.path: record.event.bytes
        for record in read_events(run.folder)
        if isinstance(record.event, Artifact)
    }
    weights = sizes.get("adapter/adapter_model.safetensors")
    size = f" ({bytes_text(weights)})" if weights else ""
    # Each path is printed whole on one line, however narrow the terminal, to be copied.
    for label, text in (("adapter", f"{run.adapter}{size}"), ("report", str(run.report))):
        display.whole_line(label, text)


def _show_answers(display: Display, events: list[Event], count: int) -> None:
    answers = [e for e in _of_last_process(events) if isinstance(e, Answered)]
    before = {(e.source, e.row): e for e in answers if e.when == "before"}
    after = [e for e in answers if e.when == "after" and (e.source, e.row) in before]
    for answer in after[:count]:
        asked = f"held-out row {counted(answer.row, answer.source)}: "
        question = _shown(answer.prompt)
        texts = (
            ("before", _shown(before[answer.source, answer.row].text)),
            ("after", _shown(answer.text)),
            ("in the data", _shown(answer.reference)),
        )
        if display.live:
            display.line()
            display.block(Block("asked", [asked + question]))
            table = Table(expand=True, show_lines=False)
            for name, style in (("before", "dim"), ("after", "green"), ("in the data", "")):
                table.add_column(name, ratio=1, style=style, overflow="fold")
            table.add_row(*(Text(text) for _, text in texts))
            display.console.print(table)
        else:
            display.line(f"asked: {asked}{_one_line(question)}")
            for name, text in texts:
                display.line(f"{name}: {_one_line(text)}")


def _shown(text: str) -> str:
    return visible(shortened(re.sub(r"\n{2,}", "\n", text.strip()), ANSWER_LENGTH))


def _one_line(text: str) -> str:
    return text.replace("\n", " ⏎ ")
