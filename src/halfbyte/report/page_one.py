"""Page one: for somebody who has one page's time and need not know what a gradient is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from halfbyte.data.example import counted
from halfbyte.report import figures
from halfbyte.report.blocks import (
    Answers,
    Bar,
    Bars,
    Block,
    Items,
    Paragraph,
    Section,
    Shown,
    Tiles,
)
from halfbyte.report.result import five_sentences, limits
from halfbyte.report.story import Answer, Story

SHOWN_ANSWERS = 3
# How much of a prompt and of an answer page one shows; the rest is in the results.
LONGEST_PROMPT, LONGEST_ANSWER, MOST_LINES = 150, 150, 5


def page_one(story: Story) -> list[Section]:
    """Its parts in order; title, author and objective stand above them."""
    return [
        Section("The result in five sentences", "result", [Items(five_sentences(story), True)]),
        Section("Held-out loss", "held-out-loss", _held_out(story)),
        Section("Answers before and after", "answers", _answers(story)),
        Section("Time and energy", "cost", [_cost(story)]),
        Section("What this result is not good for", "limits", [Items(limits(story))]),
    ]


def state(story: Story) -> str:
    """The run's state in a few words."""
    if story.finished is not None:
        return "finished"
    done = f"step {figures.count(story.last_step)} of {figures.count(story.planned_steps)}"
    stopped = story.interrupted or story.diverged
    return f"stopped at {done}" if stopped else f"not finished: {done}"


def cut(text: str, longest: int) -> str:
    """``text`` without its empty lines, or as many of its lines and words as fit, with dots."""
    lines = [line.rstrip() for line in text.strip().splitlines() if line.strip()]
    text, head = "\n".join(lines), "\n".join(lines[:MOST_LINES])
    if len(head) > longest:
        head = head[:longest]
        at = head.rfind(" ")
        head = head[: at if at > longest // 2 else longest]
    return text if len(head) >= len(text) else f"{head.rstrip()} …"


def shown_in_full(answers: Sequence[Answer]) -> list[Shown]:
    """Prompts and answers letter by letter."""
    return [_shown(a, a.prompt.strip(), lambda text: text.strip()) for a in answers]


def shown_short(answers: Sequence[Answer]) -> list[Shown]:
    """Prompts and answers as page one has room for them.

    What all prompts begin with, such as one instruction for all rows, tells them not apart.
    """
    same = _common_beginning([a.prompt.strip() for a in answers])
    return [
        _shown(
            a,
            cut(" ".join(a.prompt.strip()[same:].split()), LONGEST_PROMPT),
            lambda text: cut(text, LONGEST_ANSWER),
        )
        for a in answers
    ]


def is_cut(story: Story) -> bool:
    """Whether page one leaves out anything of the held-out prompts and answers."""
    return shown_short(story.answers[:SHOWN_ANSWERS]) != shown_in_full(story.answers)


def _shown(answer: Answer, prompt: str, fit: Callable[[str], str]) -> Shown:
    def given(text: str | None) -> str:
        return "(not asked)" if text is None else fit(text) or "(empty)"

    return Shown(
        f"Held-out row {counted(answer.row, answer.source)}",
        prompt or "(empty)",
        given(answer.before),
        given(answer.after),
        given(answer.reference),
    )


def _common_beginning(prompts: list[str]) -> int:
    """Letters of the paragraphs that all of ``prompts`` begin with; 0 unless something follows."""
    first, mark = prompts[0], "\n\n"
    same = 0
    while len(prompts) > 1 and (end := first.find(mark, same)) >= 0:
        beginning = first[: end + len(mark)]
        if not all(p.startswith(beginning) and len(p) > len(beginning) for p in prompts):
            break
        same = len(beginning)
    return same


def _held_out(story: Story) -> list[Block]:
    last = "The adapter" if story.kept else "The adapter so far"
    values = [
        ("The base model", story.base.loss if story.base else None),
        ("The base model in 4 bits", story.quantized_base.loss if story.quantized_base else None),
        (last, story.adapter_loss),
    ]
    if all(value is None for _, value in values):
        return [Paragraph("Not measured: no rows were held out, or none was read by the model.")]
    longest = max([v for _, v in values if v is not None and math.isfinite(v)], default=0.0)
    bars = [
        Bar(
            label,
            "not measured" if value is None else figures.loss(value),
            figures.NONE if value is None else f"{figures.choices(value)} tokens",
            None if value is None or not math.isfinite(value) else value / (longest or 1.0),
            strong=label == last,
        )
        for label, value in values
    ]
    measured = story.adapter or story.quantized_base or story.base
    over = ""
    if measured is not None:
        over = (
            f"Mean over {figures.many(measured.labels, 'token')} (pieces of words) of "
            f"{figures.many(measured.rows, 'row')}; lower is better. "
        )
    caption = f"{over}A loss of x is the uncertainty of a choice among eˣ equally likely tokens."
    return [Bars(("model", "held-out loss", "as unsure as a choice among"), bars, caption)]


def _cost(story: Story) -> Tiles:
    training = sum(s.seconds for s in story.steps)
    tokens = sum(s.tokens for s in story.steps)
    energies = story.energies
    if energies:
        joules = sum(e.joules for e in energies)
        energy = figures.watt_hours(joules)
        sources = ", ".join(dict.fromkeys(e.source for e in energies))
        note = f"{figures.joules(joules)} in the steps, by {sources}"
        if len(energies) < len(story.processes):
            note += "; at least, since a process that was cut off reported none"
    else:
        energy, note = "not reported", "the device gives no figure of its energy"
    device, where = _device(story)
    return Tiles(
        [
            (
                "time",
                figures.duration(story.working_seconds),
                f"of which {figures.duration(training)} in training steps",
            ),
            ("energy", energy, note),
            (
                "speed",
                figures.speed(tokens, training),
                f"{figures.many(tokens, 'token')} in all",
            ),
            ("device", device, where),
        ]
    )


def _device(story: Story) -> tuple[str, str]:
    if not story.environments:
        return story.plan.device if story.plan else figures.NONE, ""
    machine = story.environments[-1]
    if machine.gpu is None:
        return "CPU", f"{machine.cpu}, {figures.many(machine.cpu_threads, 'thread')}, no GPU"
    memory = machine.gpu_memory_bytes
    return machine.gpu, f"{figures.gib(memory)} of memory" if memory else ""


def _answers(story: Story) -> list[Block]:
    if not story.answers:
        if story.finished is None:
            text = "None yet: held-out prompts are answered at the end of a run."
        else:
            text = "None: no rows were held out, or the recipe asks for no prompts."
        return [Paragraph(text)]
    some = story.answers[:SHOWN_ANSWERS]
    kept = "One held-out prompt" if len(some) == 1 else f"{len(some)} held-out prompts"
    text = f"{kept}, drawn by the seed and not picked"
    if is_cut(story):
        text += "; all of them stand in full in the results"
    return [Paragraph(text + "."), Answers(shown_short(some))]
