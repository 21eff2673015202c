"""What the checks of the audit look at, and the form of what they find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.by_place import ByPlace
from halfbyte.data.example import Example
from halfbyte.data.template import Template
from halfbyte.events.types import Found
from halfbyte.recipe.data_schema import DataRecipe

# Before a run the costly checks look at so many rows, spread evenly: a mistake that spoils a run
# is in more than a few of them. `halfbyte data` looks at all.
LOOKED_AT = 1000
ROWS_NAMED = 5
EXAMPLES = 3

# Why rows are left out, as Audited.rows_dropped says it; more are in turns and long_rows.
EMPTY_ANSWER = "empty answer"
NOTHING_LEFT = "nothing to learn after cutting"
# A mistake in more than half of the rows is one of the whole file, and in fewer than one in
# twenty one of single rows.
MOST, MANY = 0.5, 0.05


@dataclass(frozen=True)
class Subject:
    """Rows as they will be trained; ``tokenized[i]`` is ``rows[i]``.

    ``dropped`` are the rows that are left out, by the reason. ``thorough`` looks at every row and
    for near duplicates too.
    """

    data: DataRecipe
    rows: Sequence[Example]
    tokenized: Sequence[TokenizedRow]
    held_out: Sequence[Example]
    tokenizer: Any
    template: Template
    max_length: int
    dropped: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    thorough: bool = False

    @cached_property
    def looked_at(self) -> range:
        """Places in ``rows`` that the costly checks look at."""
        step = 1 if self.thorough else max(1, -(-len(self.rows) // LOOKED_AT))
        return range(0, len(self.rows), step)

    def seen(self) -> Iterator[tuple[int, Example]]:
        """The rows looked at, each behind its place."""
        return enumerate(self.rows) if self.thorough else iter(self._sample)

    @cached_property
    def _sample(self) -> list[tuple[int, Example]]:
        return [(place, self.rows[place]) for place in self.looked_at]

    def whole(self) -> Iterator[tuple[int, Example]]:
        """Each row of a source, behind its place in ``rows``.

        A conversation may have become several rows, which follow one another; the last of them
        holds the others.
        """
        last: tuple[int, Example] | None = None
        for place, row in enumerate(self.rows):
            if last is not None and (last[1].source, last[1].row) != (row.source, row.row):
                yield last
            last = place, row
        if last is not None:
            yield last

    def share(self, places: Sequence[int]) -> float:
        """Of the rows looked at."""
        return len(places) / max(1, len(self.looked_at))

    def of(self, places: Sequence[int]) -> str:
        """ "12 of 500 rows": of the rows looked at."""
        looked = len(self.looked_at)
        where = "" if looked == len(self.rows) else " looked at"
        return f"{len(places):,} of {looked:,} rows{where}"

    def found(
        self,
        name: str,
        severity: str,
        text: str,
        todo: str,
        places: Sequence[int] = (),
        examples: Sequence[str] = (),
    ) -> Found:
        """A finding on the rows at ``places``, all of them."""
        rows, sources = self._named([self.rows[place] for place in places[:ROWS_NAMED]])
        return Found(
            name=name,
            severity=severity,
            text=text,
            todo=todo,
            count=len(places),
            of=len(self.looked_at),
            rows=rows,
            sources=sources,
            examples=list(examples[:EXAMPLES]),
        )

    def left_out(self, name: str, reason: str, text: str, todo: str) -> list[Found]:
        """A finding on the rows that ``dropped`` has by ``reason``, if there are any."""
        left_out = self.dropped.get(reason, ())
        if not len(left_out):
            return []
        rows, sources = self._named(left_out[:ROWS_NAMED])
        count = len(self.rows) + len(self.held_out) + sum(map(len, self.dropped.values()))
        share = len(left_out) / count
        return [
            Found(
                name=name,
                severity="error" if share >= MOST else "warning" if share >= MANY else "note",
                text=f"{len(left_out):,} of {count:,} rows {text}",
                todo=todo,
                count=len(left_out),
                of=count,
                rows=rows,
                sources=sources,
            )
        ]

    def _named(self, rows: Sequence[Example]) -> tuple[list[int], list[int]]:
        """Where ``rows`` stand, as :class:`Found` has it: their numbers and their sources."""
        sources = [row.source for row in rows] if self.data.sources else []
        return [row.row for row in rows], sources


class Seen(ByPlace[Example]):
    """The rows that ``subject`` looks at."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def __len__(self) -> int:
        return len(self._subject.looked_at)

    def at(self, place: int) -> Example:
        return self._subject.rows[self._subject.looked_at[place]]

    def __iter__(self) -> Iterator[Example]:
        return (row for _, row in self._subject.seen())


def fields_of(row: Example) -> list[str]:
    """Every text of a row, apart from what a template writes around them."""
    parts = (row.text, row.instruction, row.input)
    said = [part for part in parts if part]
    for message in row.messages:
        said.append(message.content)
        if message.reasoning:
            said.append(message.reasoning)
    return said


def snippet(text: str, start: int, end: int, around: int = 24) -> str:
    """``text[start:end]`` in its surroundings, on one line, with private data hidden."""
    from halfbyte.data.audit.private import hidden

    left, right = max(0, start - around), min(len(text), end + around)
    # Hidden in a wider window, so that what the window cuts in two is hidden as well.
    wide = max(0, left - 64)
    piece = hidden(text[wide : right + 64])[left - wide : right - wide]
    line = " ".join(piece.split())
    return f"{'…' if left else ''}{line}{'…' if right < len(text) else ''}"
