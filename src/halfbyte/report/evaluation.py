"""What an evaluation of the finished adapter found: base and adapter on the same rows."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.evaluate.figure_text import (
    GROUPS,
    LOOKS,
    difference_text,
    interval_text,
    look_text,
)
from halfbyte.evaluate.results import ANSWERS, FOLDER, Figure, Results
from halfbyte.report import figures
from halfbyte.report.blocks import Block, Heading, Paragraph, Table
from halfbyte.report.story import Story

TITLE = "Judged on held-out rows"
_WHO = {"reference": "in the data"}


def judged(story: Story) -> list[Block]:
    """The part on the evaluation; nothing where there was none."""
    found = story.judged
    if found is None:
        return []
    if isinstance(found, str):
        return [Heading(TITLE), Paragraph(f"{found}; make it again with halfbyte evaluate.")]
    blocks: list[Block] = [Heading(TITLE), Paragraph(_what(found))]
    if story.is_of_another_adapter(found.about.get("adapter_sha256")):
        blocks.append(
            Paragraph(
                "The figures are of an earlier adapter of this run, and not of the one that it has "
                "now; make them again with halfbyte evaluate."
            )
        )
    for group, title in GROUPS.items():
        some = [figure for figure in found.figures if figure.group == group]
        if some:
            blocks.append(_figures(title, some))
    if found.wins:
        blocks.append(_wins(found))
    if found.looks:
        blocks.append(_looks(found))
    blocks += [Paragraph(f"{note[:1].upper()}{note[1:]}") for note in found.notes]
    blocks.append(Paragraph(_how(found)))
    return blocks


def _what(found: Results) -> str:
    about = found.about
    rows, questions = (_whole(about.get(key)) for key in ("rows", "questions"))
    text = (
        f"The adapter against its base, which is the same model in 4 bits without the adapter, "
        f"shown the same prompts: {figures.many(rows, 'row')} of {about.get('data')}"
    )
    if about.get("held_out"):
        text += " that did not train"
    if questions:
        text += f", and {figures.many(questions, 'question')} with choices"
    return f"{text}."


def _how(found: Results) -> str:
    longest = found.settings.get("max_new_tokens")
    answers = "" if longest is None else f" Answers are greedy, of {longest} tokens at most."
    return (
        "In brackets are 95 % intervals, by resampling the rows; shares differ by points. A "
        "difference is called real where chance alone gives one as large less than once in twenty "
        "times; of twenty figures without any difference, one is then called real too."
        f"{answers} Each row's answers and scores are "
        f"in {FOLDER}/{ANSWERS}."
    )


def _figures(title: str, some: Sequence[Figure]) -> Table:
    rows = [
        (
            figure.name,
            interval_text(figure, figure.base),
            interval_text(figure, figure.adapter),
            difference_text(figure),
            figure.chance.words,
        )
        for figure in some
    ]
    return Table((title, "base", "adapter", "difference", "by chance?"), rows, "lrrrl")


def _wins(found: Results) -> Table:
    return Table(
        ("rows won by", "base", "adapter", "ties"),
        [(w.name, *map(figures.count, (w.base, w.adapter, w.ties))) for w in found.wins],
        "lrrr",
    )


def _looks(found: Results) -> Table:
    rows = [
        (name, *(look_text(key, looks.get(key)) for looks in found.looks.values()))
        for key, name in LOOKS.items()
        if any(looks.get(key) for looks in found.looks.values())
    ]
    columns = ("how the answers look", *(_WHO.get(who, who) for who in found.looks))
    return Table(columns, rows, "l" + "r" * len(found.looks), "Shares are of all rows.")


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
