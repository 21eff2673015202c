"""What a person sees of a run, made from events alone."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

import pytest
from rich.console import Console

from halfbyte.cli.display import Display
from halfbyte.events import EventLog
from halfbyte.events.types import (
    Audited,
    Choice,
    Evaluated,
    Event,
    Fallback,
    Phase,
    PhaseProgress,
    PhaseStarted,
    RunStarted,
    Step,
    TrainingStarted,
    Warned,
)

STEPS = 23
LOGGED = re.compile(r"^step +(\d+)/(\d+) .*loss ([0-9.]+) ", re.MULTILINE)


def audited(**changed: object) -> Audited:
    values: dict[str, object] = {
        "source": "rows.jsonl",
        "rows_read": 30,
        "rows_used": 20,
        "rows_held_out": 4,
        "rows_shortened": 2,
        "rows_dropped": {"the answer is empty": 6},
        "template": "chat",
        "loss_on": "answer",
        "max_length": 64,
        "tokens": 1000,
        "labels": 370,
        "length_percentiles": {"0": 11, "50": 42, "90": 60, "99": 63, "100": 99},
        "sample": [("<user>\nWhat?", False), ("This.<end>", True), ("\n", False)],
        "sample_row": 6,
    }
    return Audited(**{**values, **changed})  # type: ignore[arg-type]


def step(number: int, loss: float) -> Step:
    return Step(number, number / 10, loss, 1e-4, 1.0, 100, 50, 0.5, 2_000_000_000)


def started() -> TrainingStarted:
    return TrainingStarted(20, 2, 1, STEPS, 10, 2.3, "2 cores", "fp32")


def shown(events: list[Event], *, terminal: bool, colour: bool = True, width: int = 80) -> str:
    console = Console(
        file=io.StringIO(),
        force_terminal=terminal,
        color_system="standard" if terminal and colour else None,
        no_color=not colour,
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
    )
    display = Display(console, logging_steps=5)
    for event in events:
        display(event)
    display.close()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def a_run(losses: list[float]) -> list[Event]:
    return [
        RunStarted("0", [], "runs/a folder with a name that is longer than most terminals/x-1"),
        PhaseStarted("tokenize"),
        Phase("tokenize", 1.5),
        audited(),
        Choice("training.learning_rate", "auto", 2e-4, "below 13B parameters"),
        Choice("training.optimizer", "paged_adamw_8bit", "adamw_8bit", "a CPU has no pages"),
        Warned("this device only emulates bf16"),
        Fallback("CUDA graph", "there is no GPU"),
        started(),
        Evaluated(0, "quantized base", 3.0, 40, 4, 0.2),
        *(step(i + 1, loss) for i, loss in enumerate(losses)),
        Evaluated(STEPS, "adapter", 2.5, 40, 4, 0.2),
    ]


def test_a_long_phase_says_how_far_it_is() -> None:
    events = [
        PhaseStarted("tokenize"),
        PhaseProgress("tokenize", 1024, 4096),
        PhaseProgress("another", 1, 2),
        PhaseProgress("tokenize", 2048, 4096),
        Phase("tokenize", 1.5),
        PhaseStarted("quantize"),
        PhaseProgress("quantize", 21, 210, "matrices"),
        Phase("quantize", 1.5),
        PhaseStarted("save"),
    ]
    text = shown(events, terminal=True, colour=False)
    states = [line.split("\x1b[2K")[-1] for line in text.split("\r")]
    assert [state.rpartition(", ")[0] for state in states if "%" in state] == [
        "tokenize     25% of 4,096 rows",
        "tokenize     50% of 4,096 rows",
        "quantize     10% of 210 matrices",
    ]
    assert "save        …" in states[-2] + states[-1]  # the next one begins anew
    assert "%" not in shown(events, terminal=False)


def test_plain_output_is_lines_with_the_means_of_the_logged_steps() -> None:
    generator = random.Random(3)
    losses = [generator.uniform(1, 4) for _ in range(STEPS)]
    text = shown(a_run(losses), terminal=False)

    assert "\x1b" not in text
    assert "\r" not in text
    found = {int(n): float(loss) for n, _, loss in LOGGED.findall(text)}
    windows = {
        5: losses[0:5],
        10: losses[5:10],
        15: losses[10:15],
        20: losses[15:20],
        23: losses[20:],
    }
    assert found == {n: round(sum(w) / len(w), 4) for n, w in windows.items()}
    for said in (
        "30 rows read, 20 train, 4 held out",
        "2 rows",
        "6 (the answer is empty)",
        "median 42",
        "370 of them (37%) carry loss",
        "training.learning_rate = 0.0002: below 13B parameters",
        "adamw_8bit (asked: paged_adamw_8bit): a CPU has no pages",
        "warning: this device only emulates bf16",
        "fallback: CUDA graph: there is no GPU",
        "phase tokenize: 1.5 s",
        "2.5000, -0.5000 since the start",
        # A path stands whole on its line, however long.
        "runs/a folder with a name that is longer than most terminals/x-1\n",
    ):
        assert said in text
    for line in text.splitlines():  # one event's line is never wrapped into a second one
        assert not line.startswith(" ")


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_terminal_gets_the_same_words_and_loses_its_bar_at_the_end(width: int) -> None:
    text = shown(a_run([2.0] * STEPS), terminal=True, width=width)
    words = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text).split())
    for said in ("30 rows read, 20 train", "learning_rate", "no GPU", "23/23", "1.5 s"):
        assert said in words
    assert "tokens/s · 2.00 GB" in words  # the bar
    assert text.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in text  # the cursor is back


def test_the_learned_text_is_told_apart_without_colour() -> None:
    text = shown([audited()], terminal=False)
    assert re.findall("⟦(.*?)⟧", text) == ["learned", "This.<end>"]
    text = shown([audited()], terminal=True, colour=False)
    assert re.findall("⟦(.*?)⟧", text) == ["learned", "This.<end>"]
    coloured = shown([audited()], terminal=True)
    assert "⟦" not in coloured
    assert re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", coloured) == ["learned", "This.<end>"]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_row_cannot_talk_to_the_terminal(terminal: bool) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m[bold]:smile:\x00\x7f"
    sample = [(evil, False), (evil, True)]
    events = [
        audited(source=evil, sample=sample, columns={"output": evil}, rows_dropped={evil: 1}),
        Warned(evil),
        Choice("data.template", "auto", evil, evil),
        Fallback(evil, evil),
    ]
    text = shown(events, terminal=terminal)
    ours = re.sub(r"\x1b\[[0-9;]*m", "", text)  # the styles that the display itself writes
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", ours)
    assert "[bold]:smile:" in ours.replace("\n", "")


def test_a_resumed_run_goes_on_with_the_window_of_its_losses(tmp_path: Path) -> None:
    losses = [float(i) for i in range(1, STEPS + 1)]
    with EventLog(tmp_path) as log:
        for i in range(8):  # step 8 was done, but the last checkpoint is of step 7
            log(step(i + 1, losses[i]))
    events: list[Event] = [RunStarted("0", [], str(tmp_path), resumed_from=7), started()]
    events += [step(i + 1, losses[i]) for i in range(7, STEPS)]
    found = {int(n): float(loss) for n, _, loss in LOGGED.findall(shown(events, terminal=False))}
    assert found == {10: 8.0, 15: 13.0, 20: 18.0, 23: 22.0}
