"""What a report says of a run that was watched, went back, or ended early."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from halfbyte.cli.display import Display
from halfbyte.events import EventLog, Record, read_events
from halfbyte.events.types import (
    Event,
    Finished,
    Kept,
    Noticed,
    RateLowered,
    RolledBack,
    RunStarted,
    Step,
    StoppedEarly,
    TrainingStarted,
)
from halfbyte.report import make_report
from halfbyte.report.result import five_sentences
from halfbyte.report.story import read_story
from halfbyte.report.verdicts import verdicts
from halfbyte.trackers.messages import message_of
from run_records import BEGAN, write_run

PICTURES = True  # are looked at here

WATCHED: dict[str, dict[str, Any]] = {"training_started": {"watched": True}}
SPIKE = Noticed(
    "loss_spike",
    "warning",
    60,
    "the loss of step 60 is 9.120 on rows 4, 18 and 71, where 1.611 ± 0.130 was usual",
    "look at these rows",
    "rollback",
    [3, 17, 70],
)
LEFT_OUT = Step(60, 1.5, math.nan, 1e-4, math.nan, 0, 0, 0.0, 2**30, skipped=True, left_out=True)


def recorded(folder: Path) -> dict[int, Step]:
    return {e.step: e for r in read_events(folder) if isinstance(e := r.event, Step)}


def add(folder: Path, *events: Event) -> None:
    with EventLog(folder) as log:
        for number, event in enumerate(events):
            log.write(Record(BEGAN + 5_000 + number, event))


def rolled_back(folder: Path) -> Path:
    """Steps 1 to 60, a spike in 60; back to step 48, and on to step 72 without 60."""
    write_run(folder, done=60, end="cut", losses={60: 9.12}, events=WATCHED)
    first = recorded(folder)
    again = [dataclasses.replace(first[n], loss=first[n].loss + 0.25) for n in range(49, 60)]
    more = [dataclasses.replace(first[40], step=n) for n in range(61, 73)]
    add(folder, SPIKE, RolledBack(60, 48, "loss_spike"), *again, LEFT_OUT, *more)
    return folder


def test_a_batch_left_out(tmp_path: Path) -> None:
    folder = rolled_back(tmp_path / "run")
    before = {n: step.loss for n, step in recorded(write_run(tmp_path / "before")).items()}
    story = read_story(folder)
    assert [s.step for s in story.steps] == list(range(1, 73))
    assert story.repeated_steps == 12
    assert story.steps[47].loss == before[48]
    assert story.steps[50].loss == before[51] + 0.25
    assert story.noticed == [SPIKE]
    assert [c.step for c in story.checkpoints] == [12, 24, 36, 48]
    assert [e.step for e in story.evaluations] == [12, 24, 36, 48]
    expected = [before[n] + 0.25 for n in range(51, 60)]
    mean = story.windowed_loss(60)
    assert mean is not None
    assert math.isclose(mean, sum(expected) / len(expected))
    verdict = next(v for v in verdicts(story) if "finite number" in v.name)
    assert verdict.passed
    assert "1\xa0batch left out, as the recipe says" in verdict.detail
    report = make_report(folder)
    markdown = report.markdown.read_text(encoding="utf-8")
    assert "The loss of step 60 is 9.120 on rows 4, 18 and 71" in markdown
    assert (
        "The batch was left out: the run went back to step 48 and passed over step 60." in markdown
    )
    page = report.html.read_text(encoding="utf-8")
    assert "The batch was left out" in page
    assert "lines mark what was noticed at step 60" in page
    assert "noticed while it ran" in page  # the plot's own text


def test_a_later_process_that_passes_over_it_in_silence(tmp_path: Path) -> None:
    """Its checkpoint of step 55 has the batch left out; that of step 48 would not."""
    for start, known in ((55, True), (48, False)):
        folder = rolled_back(tmp_path / f"run-{start}")
        steps = recorded(folder)
        on = [steps[n] for n in range(start + 1, 60)]
        then = LEFT_OUT if known else dataclasses.replace(steps[59], step=60)
        add(folder, RunStarted("0.1.0", ["halfbyte"], "run", start), *on, then)
        story = read_story(folder)
        assert story.noticed == ([SPIKE] if known else [])
        assert [b.to for b in story.rolled_back] == ([48] if known else [])
        assert story.last_step == 60
        assert "went back to step 48" in make_report(folder).markdown.read_text() or not known


def test_what_was_said_and_what_was_done(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", end="cut", events=WATCHED)
    clipped = Noticed("gradient_clipped", "note", 110, "it was clipped", "no harm is done")
    lowered = dataclasses.replace(SPIKE, step=70, action="lower_rate")
    many = [
        Noticed(
            "gradient_not_finite", "warning", n, f"the gradient of step {n} is not finite", "look"
        )
        for n in range(80, 88)
    ]
    stopped = Noticed("no_learning", "warning", 120, "the loss has not fallen", "see", "stop")
    add(folder, lowered, RateLowered(70, 71, 0.5, "loss_spike"), *many, clipped, stopped)
    lines = make_report(folder).markdown.read_text(encoding="utf-8").replace("\\_", "_").split("\n")
    text = " ".join(lines[lines.index("### Watching") :])
    for words in (
        "The learning rate was multiplied by 0.5 from step 71 on.",
        "It was clipped. No harm is done.",
        "The run was stopped there, as watch.no_learning says.",
        "Not shown: 3 more of gradient_not_finite, the last at step 87.",
    ):
        assert words in text, words
    assert text.index("step 60 is") < text.index("gradient_not_finite") < text.index("clipped")


def test_nothing_noticed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", events=WATCHED)
    page = make_report(folder).markdown.read_text(encoding="utf-8")
    assert "every held-out loss were watched while it ran; nothing was noticed." in page
    old = write_run(tmp_path / "old")  # a record from before there was any watching
    page = make_report(old).markdown.read_text(encoding="utf-8")
    assert "Watching" not in page


def test_a_run_that_ended_early(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", done=84, end="cut", worse_after=48, events=WATCHED)
    losses = {e["step"]: e["loss"] for e in map(json.loads, _lines(folder)) if _is_adapter(e)}
    best = min(losses, key=lambda step: losses[step])
    add(
        folder,
        StoppedEarly(84, 3, best, losses[best]),
        Kept(best, "the lowest held-out loss", losses[best]),
        Finished(84, 99.0),
    )
    story = read_story(folder)
    assert "ended before step 120 as the held-out loss fell no more" in five_sentences(story)[0]
    verdict = next(v for v in verdicts(story) if v.name.startswith("every planned step"))
    assert verdict.passed
    assert "finished early" in verdict.detail
    page = make_report(folder).markdown.read_text(encoding="utf-8")
    assert (
        "The steps ended early, after 84 of 120: 3 evaluations in a row brought no new lowest "
        f"held-out loss, the lowest having been {losses[best]:.4f} after step {best}"
    ) in page


def _lines(folder: Path) -> list[str]:
    return (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()


def _is_adapter(event: dict[str, Any]) -> bool:
    return event["kind"] == "evaluation" and event["what"] == "adapter"


def test_what_trackers_are_told() -> None:
    assert message_of(SPIKE, 5.0) == {
        "kind": "text",
        "step": 60,
        "time": 5.0,
        "text": f"{SPIKE.text}; look at these rows.",
    }
    assert message_of(LEFT_OUT, 5.0) is None


def test_what_the_screen_says(tmp_path: Path) -> None:
    """Logged losses are means of the steps that hold, in a pipe."""
    file = io.StringIO()
    display = Display(Console(file=file, width=200, no_color=True), logging_steps=5)

    def step(number: int, loss: float, **more: Any) -> Step:
        return Step(number, 1.0, loss, 1e-4, 1.0, 10, 5, 0.1, 2**30, **more)

    noticed = dataclasses.replace(SPIKE, step=7, text="the loss of step 7 is 90", todo="look")
    said = dataclasses.replace(noticed, name="loss_zero", action="say", step=9)
    stopped = dataclasses.replace(noticed, action="stop")
    left_out = step(7, math.nan, skipped=True, left_out=True)
    with EventLog(tmp_path, listeners=[display]) as log:
        log(RunStarted("0.1.0", ["halfbyte"], str(tmp_path)))
        log(TrainingStarted(20, 2, 1, 20, 10, 2.0, "2 cores", "fp16"))
        for number in range(1, 7):
            log(step(number, float(number)))
        log(step(7, 90.0))
        for event in (noticed, RolledBack(7, 4, "loss_spike"), step(5, 10.0), step(6, 20.0)):
            log(event)
        for event in (left_out, step(8, 30.0), step(9, 40.0), said, step(10, 50.0), stopped):
            log(event)
        log(RolledBack(10, 10, "loss_not_finite"))
        log(RateLowered(10, 11, 0.5, "loss_spike"))
        log(StoppedEarly(10, 3, 5, 1.25))
    display.close()
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    steps = [line for line in lines if line.startswith("step ") and " loss " in line]
    means = [15 / 5, (1 + 2 + 3 + 4 + 10) / 5, (20 + 30 + 40 + 50) / 4]
    assert [line.split(" loss ")[1].split()[0] for line in steps] == [f"{m:.4f}" for m in means]
    assert [line for line in lines if not line.startswith(("run folder", "training", "step"))] == [
        "",
        "warning: the loss of step 7 is 90.",
        "back to the checkpoint of step 4; step 7 will be passed over, its batch left out",
        "warning: the loss of step 7 is 90; look.",
        "the learning rate is multiplied by 0.5 from step 11 on",
        "ending early: 3 evaluations in a row without a new lowest held-out loss (lowest 1.2500 "
        "after step 5)",
    ]
    assert "step 10 is left out; it made no update" in lines
    assert "overflowed" not in file.getvalue()
