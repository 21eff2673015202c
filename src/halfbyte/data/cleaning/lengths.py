"""Rows whose question or answer is too short or too long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from halfbyte.data.cleaning.parts import Verdict, beginning, calls_a_tool, part
from halfbyte.data.cleaning.words import count_words
from halfbyte.data.example import Example
from halfbyte.recipe.cleaning import Length, Part


def length(settings: Length, examples: Sequence[Example]) -> Iterator[Verdict]:
    """Each bound that is stated; a plain text has no question, a call of a tool no length."""
    measures: list[tuple[Part, str, Callable[[str], int], int | None, int | None]] = [
        (
            "question",
            "words",
            count_words,
            settings.question_min_words,
            settings.question_max_words,
        ),
        ("answer", "words", count_words, settings.answer_min_words, settings.answer_max_words),
        (
            "question",
            "characters",
            len,
            settings.question_min_characters,
            settings.question_max_characters,
        ),
        (
            "answer",
            "characters",
            len,
            settings.answer_min_characters,
            settings.answer_max_characters,
        ),
    ]
    stated = [m for m in measures if m[3] is not None or m[4] is not None]
    for example in examples:
        verdict = None
        for by, unit, measure, least, most in stated:
            if example.text is not None if by == "question" else calls_a_tool(example):
                continue
            text = part(example, by)
            size = measure(text)
            if (least is not None and size < least) or (most is not None and size > most):
                verdict = f"{by} of {size:,} {unit if size != 1 else unit[:-1]}: {beginning(text)}"
                break
        yield verdict
