"""Rows with a text that a regular expression finds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial

from halfbyte.data.cleaning.parts import Verdict, around, changed, messages_of
from halfbyte.data.example import Example
from halfbyte.recipe.cleaning import Pattern


def pattern(settings: Pattern, examples: Sequence[Example]) -> Iterator[Verdict]:
    """Drops the rows in which the pattern finds something, or replaces what it finds."""
    expression = re.compile(settings.drop or settings.replace or "")
    mend = partial(expression.sub, settings.replacement)
    for example in examples:
        found = map(expression.search, messages_of(example, settings.field))
        match = next(filter(None, found), None)
        if match is None:
            yield None
            continue
        shown = around(match.string, *match.span())
        if settings.replace is None:
            yield shown
            continue
        mended = changed(example, settings.field, mend)
        yield None if mended == example else (mended, shown)
