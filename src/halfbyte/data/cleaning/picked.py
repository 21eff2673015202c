"""Some rows of many, a few of them with another text, without a second copy of the others."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping

from halfbyte.data.by_place import ByPlace
from halfbyte.data.example import Example
from halfbyte.data.example_store import ExampleStore


class Picked(ByPlace[Example]):
    """The rows of ``source`` at ``places``, in this order; 8 bytes of memory each.

    ``instead`` are rows of ``mended`` by the places in ``source`` for which they stand. The rows
    themselves stay where they are, which for many of them is a file.
    """

    def __init__(
        self,
        source: ExampleStore,
        places: Iterable[int] | None = None,
        instead: Mapping[int, int] | None = None,
        mended: ExampleStore | None = None,
    ) -> None:
        self.source = source
        self.places = array("q", range(len(source)) if places is None else places)
        self._instead = dict(instead or {})
        self._mended = ExampleStore() if mended is None else mended

    def __len__(self) -> int:
        return len(self.places)

    def at(self, place: int) -> Example:
        return self.of_source(self.places[place])

    def each(self, places: Iterable[int]) -> Iterator[Example]:
        picked = array("q", map(self.places.__getitem__, places))
        for place, row in zip(picked, self.source.each(picked), strict=True):
            other = self._instead.get(place)
            yield row if other is None else self._mended[other]

    @property
    def many(self) -> bool:
        """Whether there are so many in the source that some are in a file."""
        return self.source.many

    def stored(self, place: int) -> bytes:
        """The row at ``place`` as the store writes it."""
        where = self.places[place]
        other = self._instead.get(where)
        return self.source.stored(where) if other is None else self._mended.stored(other)

    def of_source(self, place: int) -> Example:
        """The row that stands for the one at ``place`` of ``source``."""
        other = self._instead.get(place)
        return self.source[place] if other is None else self._mended[other]

    def left(self, places: Iterable[int], changed: Iterable[tuple[int, Example]] = ()) -> Picked:
        """Of the source those at ``places``, some of them ``changed``."""
        instead = dict(self._instead)
        for place, example in changed:
            instead[place] = len(self._mended)
            self._mended.append(example)
        return Picked(self.source, places, instead, self._mended)

    def among(self, places: Iterable[int]) -> Picked:
        """Of these rows those at ``places``."""
        return self.left(map(self.places.__getitem__, places))
