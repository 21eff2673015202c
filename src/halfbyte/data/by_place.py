"""Sequences whose things are made, or read, when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import starmap
from operator import eq
from typing import TypeVar, overload

T = TypeVar("T")


class ByPlace(Sequence[T], ABC):
    """A sequence that gives the thing at a place; equal to any sequence of equal things."""

    @abstractmethod
    def at(self, place: int) -> T:
        """The thing at ``place``, from 0 to the length."""

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
