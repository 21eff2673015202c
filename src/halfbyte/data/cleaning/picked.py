"""Some rows of many, a few of them with another text, without a second copy of the others."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import overload

from halfbyte.data.example import Example
from halfbyte.data.example_store import ExampleStore


class Picked(Sequence[Example]):
    """The rows of ``source`` at ``places``, in this order; 8 bytes of memory each.

    ``instead`` are rows of ``mended`` by the places in ``source`` for which they stand. The rows
    themselves stay where they are, which for many of them is a file.
    """

    def __init__(
        self,
        source: Sequence[Example],
        places: Iterable[int] | None = None,
        instead: Mapping[int, int] | None = None,
        mended: ExampleStore | None = None,
    ) -> None:
        self.source = source
        self.places = array("q", range(len(source)) if places is None else places)
        self._instead = dict(instead or {})
        self._mended = mended or ExampleStore()

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Picked: ...

    def __getitem__(self, index: int | slice) -> Example | Picked:
        if isinstance(index, slice):
            return Picked(self.source, self.places[index], self._instead, self._mended)
        return self.at(self.places[index])

    def __iter__(self) -> Iterator[Example]:
        return map(self.at, self.places)

    def at(self, place: int) -> Example:
        """The row that stands for the one at ``place`` of ``source``."""
        other = self._instead.get(place)
        return self.source[place] if other is None else self._mended[other]

    def left(self, places: Iterable[int], changed: Iterable[tuple[int, Example]]) -> Picked:
        """Of these rows those at ``places`` of ``source``, some of them ``changed``."""
        instead = self._instead
        for place, example in changed:
            instead[place] = len(self._mended)
            self._mended.append(example)
        return Picked(self.source, places, instead, self._mended)
