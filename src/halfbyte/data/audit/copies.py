"""Rows that stand in the data more than once, or on both sides of the split."""

from __future__ import annotations

from collections.abc import Iterable

from halfbyte.data.audit.subject import MANY, Subject
from halfbyte.data.example import Example
from halfbyte.events.types import Found

# With fewer held-out rows than this, all of them being copies is an accident.
ALL_HELD_OUT = 3


def find_copies(subject: Subject) -> list[Found]:
    """Findings on duplicates and on held-out rows that train as well."""
    return [*_exact(subject), *_held_out(subject)]


def content(row: Example) -> tuple[str | None, ...]:
    """All that makes two rows copies of one another."""
    return (row.text, row.instruction, row.input, *(f"{m.role} {m.content}" for m in row.messages))


def _exact(subject: Subject) -> list[Found]:
    count = len(subject.rows)
    places = later_copies(hash(content(row)) for row in subject.rows)
    if not places:
        return []
    return [
        subject.found(
            "duplicates",
            "warning" if len(places) >= max(2, MANY * count) else "note",
            f"{len(places):,} of {count:,} rows that train are copies of an earlier one",
            "remove them with data.cleaning, or they weigh more than the others",
            places,
        )
    ]


def later_copies(keys: Iterable[int]) -> list[int]:
    """The places of ``keys`` that were there before."""
    seen: set[int] = set()
    places = []
    for place, key in enumerate(keys):
        if key in seen:
            places.append(place)
        seen.add(key)
    return places


def _held_out(subject: Subject) -> list[Found]:
    if not subject.held_out:
        return []
    trained = {hash(content(row)): place for place, row in enumerate(subject.rows)}
    known = [hash(content(row)) for row in subject.held_out]
    places = [trained[key] for key in known if key in trained]
    if not places:
        return []
    count = len(subject.held_out)
    whole = len(places) == count >= ALL_HELD_OUT
    return [
        subject.found(
            "held-out-in-training",
            "error" if whole else "warning",
            f"{len(places):,} of {count:,} held-out rows are also among the rows that train, so "
            "the held-out loss looks better than it is",
            "remove the copies from the data",
            places,
        )
    ]
