"""The page of ``halfbyte compare``: prompts, and the answers of several models beside each other.

One HTML file, light or dark as the reader's system is, with nothing to fetch and no script.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.data.audit.private import hidden
from halfbyte.report import figures
from halfbyte.report.html import render_page
from halfbyte.report.side_by_side import SideBySide, ending

# Answers in a row of the page; more than these are laid out in several.
MOST_ABREAST = 3


@dataclass(frozen=True)
class _Answer:
    name: str
    note: str
    text: str
    reference: bool = False


@dataclass(frozen=True)
class _Prompt:
    anchor: str
    title: str
    first_words: str
    question: str
    answers: list[_Answer]


def side_by_side_page(seen: SideBySide) -> str:
    """The page; private data are hidden, the record beside it holds the texts as they are."""
    prompts = []
    for number, one in enumerate(seen.asked, 1):
        answers = [
            _Answer(column.name, ending(answer).removeprefix(", "), hidden(answer.text))
            for column, answer in zip(seen.columns, one.answers, strict=True)
        ]
        if one.reference is not None:
            answers.append(_Answer("reference", "the row itself", hidden(one.reference), True))
        question = hidden(one.question)
        prompts.append(
            _Prompt(f"prompt-{number}", one.title, _first_words(question), question, answers)
        )
    count = len(prompts[0].answers) if prompts else 1
    return render_page(
        "side_by_side.html.jinja",
        "side_by_side.css",
        title=f"{figures.many(len(prompts), 'prompt')}, {figures.many(len(seen.columns), 'model')}",
        seen=seen,
        when=figures.moment(seen.made),
        limit=figures.many(seen.max_new_tokens, "token"),
        prompts=prompts,
        abreast=min(count, MOST_ABREAST if count != 4 else 2),
    )


def _first_words(text: str, most: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"
