"""The filters of a recipe, one after the other, and what each of them did."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from halfbyte.data.audit.private import hidden
from halfbyte.data.cleaning.duplicates import exact_duplicates
from halfbyte.data.cleaning.encoding import check_ftfy, encoding
from halfbyte.data.cleaning.language import check_languages, language
from halfbyte.data.cleaning.lengths import length
from halfbyte.data.cleaning.minhash import check_datasketch
from halfbyte.data.cleaning.near_duplicates import near_duplicates
from halfbyte.data.cleaning.overlap import overlap_with_held_out
from halfbyte.data.cleaning.parts import Verdict
from halfbyte.data.cleaning.patterns import pattern
from halfbyte.data.cleaning.picked import Picked
from halfbyte.data.cleaning.script import script
from halfbyte.data.cleaning.unfinished import unfinished
from halfbyte.data.example import Example
from halfbyte.data.example_store import ExampleStore
from halfbyte.events.types import Filtered, Funnel, RowShown
from halfbyte.recipe import cleaning as recipe

EXAMPLES = 3  # rows of each filter that are shown

Judge = Callable[[Sequence[Example]], Iterator[Verdict]]


@dataclass(frozen=True)
class Cleaned:
    """The rows that are left, in their order and with their numbers, and what was done."""

    examples: Picked
    funnel: Funnel


def clean(
    filters: Sequence[recipe.Filter],
    examples: Sequence[Example],
    held_out: Sequence[Example] | None = None,
) -> Cleaned:
    """Apply ``filters`` in their order to ``examples``.

    With ``held_out`` given those that look for an overlap with these rows are applied in their
    place; without they are left out, to be applied when it is known which rows are held out. Each
    filter's time is linear in the rows, and it keeps no more than some hundred bytes of each; the
    rows themselves are read from ``examples`` again and again, be they in memory or in a file.
    Raises DataError, before any row is looked at, where a filter needs a package that is missing.
    What is shown of rows has likely private data hidden.
    """
    check_packages(filters)
    rows = examples if isinstance(examples, Picked) else Picked(ExampleStore(examples))
    steps: list[Filtered] = []
    for settings in filters:
        if isinstance(settings, recipe.OverlapWithHeldOut) and held_out is None:
            continue
        rows, step = _apply(settings, _judge(settings, held_out or ()), rows)
        steps.append(step)
    return Cleaned(rows, Funnel(len(examples), len(rows), steps))


def check_packages(filters: Sequence[recipe.Filter]) -> None:
    """Raises DataError where a filter needs a package that is missing."""
    for settings in filters:
        if isinstance(settings, recipe.NearDuplicates):
            check_datasketch()
        elif isinstance(settings, recipe.LanguageFilter):
            check_languages(settings)
        elif isinstance(settings, recipe.EncodingFilter) and settings.repair:
            check_ftfy()


def joined(first: Funnel, then: Funnel) -> Funnel:
    """Two funnels as one, where ``then`` took some of the rows that ``first`` left.

    Those that it did not look at, such as the held-out rows, are counted among those left.
    """
    left = first.rows_out - then.dropped
    return Funnel(first.rows_in, left, [*first.filters, *then.filters])


def _judge(settings: recipe.Filter, held_out: Sequence[Example]) -> Judge:
    match settings:
        case recipe.ExactDuplicates():
            return partial(exact_duplicates, settings)
        case recipe.NearDuplicates():
            return partial(near_duplicates, settings)
        case recipe.Length():
            return partial(length, settings)
        case recipe.Pattern():
            return partial(pattern, settings)
        case recipe.Unfinished():
            return partial(unfinished, settings)
        case recipe.ScriptFilter():
            return partial(script, settings)
        case recipe.LanguageFilter():
            return partial(language, settings)
        case recipe.EncodingFilter():
            return partial(encoding, settings)
        case recipe.OverlapWithHeldOut():
            return partial(overlap_with_held_out, settings, held_out=held_out)
        case _:
            raise TypeError(f"{settings.filter} is no filter that is known here")


def _apply(settings: recipe.Filter, judge: Judge, rows: Picked) -> tuple[Picked, Filtered]:
    left = array("q")
    changed = ExampleStore()
    at: list[int] = []  # of those that are changed
    shown: list[RowShown] = []
    for place, verdict in zip(rows.places, judge(rows), strict=True):
        if verdict is None:
            left.append(place)
            continue
        if isinstance(verdict, str):
            why = verdict
        else:
            mended, why = verdict
            left.append(place)
            at.append(place)
            changed.append(mended)
        if len(shown) < EXAMPLES:
            example = rows.of_source(place)
            shown.append(RowShown(example.row, hidden(why), example.source))
    step = Filtered(
        settings.filter, settings.words, len(rows), len(rows) - len(left), len(at), shown
    )
    return rows.left(left, zip(at, changed, strict=True)), step
