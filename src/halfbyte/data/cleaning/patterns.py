"""Rows with a text that a regular expression finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from halfbyte.data.cleaning.parts import Verdict, around, changed, messages_of
from halfbyte.data.example import Example
from halfbyte.data.expressions import RecipeExpression
from halfbyte.data.template_process import BATCH, BATCH_CHARACTERS
from halfbyte.recipe.cleaning import Pattern


def pattern(settings: Pattern, examples: Sequence[Example]) -> Iterator[Verdict]:
    """Drops the rows in which the pattern finds something, or replaces what it finds."""
    expression = RecipeExpression(settings.drop or settings.replace or "", "data.cleaning")
    replacement = None if settings.replace is None else settings.replacement
    for batch, texts in _batches(settings, examples):
        found = expression.search(texts, replacement, [example.at for example in batch])
        for example, said, one in zip(batch, texts, found, strict=True):
            if one is None:
                yield None
                continue
            place, begin, end, written = one
            shown = around(said[place], begin, end)
            if replacement is None:
                yield shown
                continue
            mended = changed(
                example, settings.field, dict(zip(said, written, strict=True)).__getitem__
            )
            yield None if mended == example else (mended, shown)


def _batches(
    settings: Pattern, examples: Sequence[Example]
) -> Iterator[tuple[list[Example], list[list[str]]]]:
    """Examples and the texts of each, as many at once as the worker takes."""
    batch: list[Example] = []
    texts: list[list[str]] = []
    characters = 0
    for example in examples:
        batch.append(example)
        texts.append(list(messages_of(example, settings.field)))
        characters += sum(map(len, texts[-1]))
        if len(batch) == BATCH or characters > BATCH_CHARACTERS:
            yield batch, texts
            batch, texts, characters = [], [], 0
    if batch:
        yield batch, texts
