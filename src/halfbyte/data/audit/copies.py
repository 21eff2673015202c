"""Rows that stand in the data more than once, or on both sides of the split."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec

import numpy as np

from halfbyte.data.audit.private import hidden
from halfbyte.data.audit.subject import MANY, Subject
from halfbyte.data.by_place import Chained
from halfbyte.data.cleaning.duplicates import row_key
from halfbyte.data.cleaning.near_duplicates import near_duplicates
from halfbyte.data.cleaning.parts import shown_part
from halfbyte.data.example import Example
from halfbyte.events.types import Found
from halfbyte.recipe.cleaning import NearDuplicates

# With fewer held-out rows than this, all of them being copies is an accident.
ALL_HELD_OUT = 3
NEAR = NearDuplicates(filter="near_duplicates")


def find_copies(subject: Subject) -> list[Found]:
    """Findings on duplicates and on held-out rows that train as well."""
    places = array("q")  # of the rows, one for each row of a source

    def rows() -> Iterator[Example]:
        for place, row in subject.whole():
            places.append(place)
            yield row

    keys = _keys(rows())
    copies = [places[at] for at in _later_ones(keys)]
    near: list[int] = []
    near_held_out: set[int] = set()
    if subject.thorough and find_spec("datasketch"):
        near, near_held_out = _near(subject, places, set(copies))
    count = len(places)
    return [
        *_duplicates(subject, copies, count),
        *_near_duplicates(subject, near, count),
        *_held_out(subject, keys, places, near_held_out),
    ]


def _keys(rows: Iterable[Example]) -> np.ndarray:
    """uint64 [rows]: a number for each row, which copies have in common.

    Eight bytes a row: of a million rows two that differ share one by a chance of 3e-8.
    """
    digests = (row_key(row, "row", normalize=False) or b"" for row in rows)
    return np.fromiter((int.from_bytes(d[:8], "little") for d in digests), dtype=np.uint64)


def _later_ones(keys: np.ndarray) -> list[int]:
    """The places of ``keys``, ascending, whose key stands at an earlier place too."""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    return sorted(order[1:][same].tolist())


def _near(subject: Subject, places: Sequence[int], copies: set[int]) -> tuple[list[int], set[int]]:
    """Places of rows that are nearly as an earlier one, and which held-out rows are as a row that
    trains.

    Held-out rows that are like one another already are not counted.
    """
    rows = Chained(subject.rows, places, subject.held_out)
    verdicts = [verdict is not None for verdict in near_duplicates(NEAR, rows)]
    near = [
        place
        for place, known in zip(places, verdicts, strict=False)
        if known and place not in copies
    ]
    among = [verdict is not None for verdict in near_duplicates(NEAR, subject.held_out)]
    both = zip(verdicts[len(places) :], among, strict=True)
    return near, {place for place, (known, twice) in enumerate(both) if known and not twice}


def _duplicates(subject: Subject, places: list[int], count: int) -> list[Found]:
    if not places:
        return []
    return [
        subject.found(
            "duplicates",
            "warning" if len(places) >= max(2, MANY * count) else "note",
            f"{len(places):,} of {count:,} rows that train are copies of an earlier one",
            "let the filter exact_duplicates of data.cleaning drop them, or they weigh more than "
            "the others",
            places,
            _shown(subject, places),
        )
    ]


def _near_duplicates(subject: Subject, places: list[int], count: int) -> list[Found]:
    if not places:
        return []
    return [
        subject.found(
            "near-duplicates",
            "warning" if len(places) >= max(2, MANY * count) else "note",
            f"{len(places):,} of {count:,} rows that train are nearly the same as an earlier one",
            "let the filter near_duplicates of data.cleaning drop them, or they weigh more than "
            "the others",
            places,
            _shown(subject, places),
        )
    ]


def _shown(subject: Subject, places: list[int]) -> list[str]:
    return [hidden(shown_part(subject.rows[place], "row")) for place in places[:3]]


def _held_out(
    subject: Subject, keys: np.ndarray, places: Sequence[int], near: set[int]
) -> list[Found]:
    known = _keys(subject.held_out).tolist()
    at = np.flatnonzero(np.isin(keys, np.array(known, dtype=np.uint64)))
    trained = {int(keys[i]): places[i] for i in at.tolist()}
    exact = {at for at, key in enumerate(known) if key in trained}
    found = exact | near
    if not found:
        return []
    count = len(subject.held_out)
    nearly = f" ({len(found - exact):,} of them nearly so)" if found - exact else ""
    return [
        subject.found(
            "held-out-in-training",
            "error" if len(found) == count >= ALL_HELD_OUT else "warning",
            f"{len(found):,} of {count:,} held-out rows are also among the rows that train{nearly}"
            ", so the held-out loss looks better than it is",
            "remove the copies from the data, by the filter overlap_with_held_out of "
            "data.cleaning or before",
            [trained[known[place]] for place in sorted(exact)],
        )
    ]
