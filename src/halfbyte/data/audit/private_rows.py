"""Rows with likely private data."""

from __future__ import annotations

from collections import Counter

from halfbyte.data.audit.private import KINDS, find_private
from halfbyte.data.audit.subject import Subject, fields_of, snippet
from halfbyte.events.types import Found


def find_private_rows(subject: Subject) -> list[Found]:
    """One finding on all kinds of private data; its examples are hidden in part."""
    places: list[int] = []
    kinds: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for place, row in subject.seen():
        here = set()
        for text in fields_of(row):
            for one in find_private(text):
                if one.kind not in examples:
                    examples[one.kind] = snippet(text, one.start, one.end)
                here.add(one.kind)
        if here:
            places.append(place)
            kinds.update(here)
    if not places:
        return []
    named = ", ".join(f"{kind}: {kinds[kind]:,}" for kind in KINDS if kinds[kind])
    return [
        subject.found(
            "private-data",
            "warning",
            f"{subject.of(places)} hold what looks like private data ({named})",
            "remove it or put a name such as [PHONE] in its place, since a model can say again "
            "what it was trained on",
            places,
            [examples[kind] for kind in KINDS if kind in examples],
        )
    ]
