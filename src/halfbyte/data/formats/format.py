"""What a format is: the one way from a row's cells to an example."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from halfbyte.data.example import Example
from halfbyte.data.formats.cells import Unreadable
from halfbyte.data.table import Cells
from halfbyte.data.template_process import TemplateStopped
from halfbyte.errors import DataError


@dataclass
class Origin:
    """Where rows are from, and what is to be told of all of them together.

    ``number`` is the source's among those of the recipe; ``files`` are its files with the number
    of each one's first row, where it has several; ``typed`` is as in Table. ``told`` counts what
    was done to rows, by the sentence that tells it.
    """

    path: str
    number: int = 0
    files: list[tuple[int, str]] = field(default_factory=list)
    typed: bool = False
    told: Counter[str] = field(default_factory=Counter)

    def at(self, row: int) -> str:
        """Where ``row`` (from 0) stands, in words that count from 1: ``a.csv, row 3``."""
        path, first = self.path, 0
        if self.files:
            first, path = self.files[bisect_right(self.files, row, key=lambda file: file[0]) - 1]
        return f"{path}, row {row - first + 1}"

    def warnings(self, rows: int) -> list[str]:
        """What was told, each with the number of the ``rows`` that it holds for."""
        return [
            f"{self.path}: in {count:,} of {rows:,} rows {what}"
            for what, count in self.told.items()
        ]


class Format(Protocol):
    """What the rows of a source are."""

    @property
    def name(self) -> str:
        """As ``data.format`` has it."""
        ...

    @property
    def reason(self) -> dict[str, str]:
        """Why each column that was looked for was taken, by its role."""
        ...

    def by_role(self) -> dict[str, str]:
        """Role (a key of ``data.columns``) to column, of the roles that have one."""
        ...

    def example(self, cells: Cells, row: int, origin: Origin) -> Example | None:
        """The row as an example, None for one that is not to be learned from.

        Raises Unreadable for a row that is not of this format.
        """
        ...


def _prepared(format: Together, rows: Iterable[Cells], origin: Origin) -> Iterator[Cells]:
    try:
        yield from format.prepared(rows)
    except TemplateStopped as stopped:
        where = f"{origin.at(stopped.place)}: data.jinja"
        raise TemplateStopped(stopped.what, stopped.place, where) from stopped


@runtime_checkable
class Together(Protocol):
    """A format that does a part of its work for many rows at once."""

    def prepared(self, rows: Iterable[Cells]) -> Iterator[Cells]:
        """The rows, each made ready for ``example`` a moment before it comes."""
        ...


def examples(format: Format, rows: Iterable[Cells], origin: Origin) -> Iterator[Example]:
    """The rows as examples, one at a time; numbered from 0 as they come.

    Raises DataError, which names the row, for the first that is not of the format.
    """
    if isinstance(format, Together):
        rows = _prepared(format, rows, origin)
    for row, cells in enumerate(rows):
        try:
            example = format.example(cells, row, origin)
        except Unreadable as error:
            raise DataError(f"{origin.at(row)}, {error}") from error
        if example is not None:
            yield example
