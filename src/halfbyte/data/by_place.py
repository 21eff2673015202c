"""Sequences whose things are made, or read, when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import starmap
from operator import eq
from typing import TypeVar, overload

T = TypeVar("T")


class ByPlace(Sequence[T], ABC):
    """A sequence that gives the thing at a place; equal to any sequence of equal things."""

    @abstractmethod
    def at(self, place: int) -> T:
        """The thing at ``place``, from 0 to the length."""

    def each(self, places: Iterable[int]) -> Iterator[T]:
        """The things at ``places``; where they are read from a file, faster if these ascend."""
        return map(self.at, places)

    def __iter__(self) -> Iterator[T]:
        return self.each(range(len(self)))

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.at(place) for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"there is none at {index} among {len(self)}")
        return self.at(place)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(starmap(eq, zip(self, other, strict=True)))

    __hash__ = None  # type: ignore[assignment]


class Chained(ByPlace[T]):
    """The things of ``first`` at ``places``, then all of ``then``."""

    def __init__(self, first: Sequence[T], places: Sequence[int], then: Sequence[T]) -> None:
        self._first, self._places, self._then = first, places, then

    def __len__(self) -> int:
        return len(self._places) + len(self._then)

    def at(self, place: int) -> T:
        count = len(self._places)
        return self._first[self._places[place]] if place < count else self._then[place - count]
