"""Things in the order in which they come: in memory while they are few, else in a file."""

from __future__ import annotations

import os
import tempfile
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from halfbyte.data.by_place import ByPlace
from halfbyte.errors import DataError

# What stays in memory: so many things, or things of so many bytes as they would be in the file.
KEPT = 50_000
KEPT_BYTES = 64 << 20
SAMPLED = 16  # one thing in so many is measured for that
WRITTEN_AT_ONCE = 1 << 20  # bytes
READ_AT_ONCE = 1 << 16  # bytes, where things are read one after another

T = TypeVar("T")


class Spool(ByPlace[T]):
    """Things in the order in which they are added; those behind the first ``kept`` in a file.

    The file is temporary, has no name, and ends with this object: of a thing in it no more than
    eight bytes stay in memory. What is read again is equal to what was added, not the same object.
    """

    def __init__(self, things: Iterable[T] = (), kept: int | None = None) -> None:
        self._first: list[T] = []
        self._kept = KEPT if kept is None else kept
        self._bytes = 0  # of those in memory, about
        self._file: IO[bytes] | None = None
        self._flushed = True
        self._ends = array("Q")  # where each thing in the file ends
        self.extend(things)

    @staticmethod
    @abstractmethod
    def encode(thing: T) -> bytes:
        """``thing`` as it stands in the file."""

    @staticmethod
    @abstractmethod
    def decode(stored: bytes) -> T:
        """What ``encode`` was given."""

    @property
    def many(self) -> bool:
        """Whether they are so many that some are in the file."""
        return self._file is not None

    def append(self, thing: T) -> None:
        if self._file is None:
            count = len(self._first)
            if count < self._kept and self._bytes < KEPT_BYTES:
                self._first.append(thing)
                if count % SAMPLED == 0:
                    self._bytes += SAMPLED * len(self.encode(thing))
                return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(  # noqa: SIM115
                    prefix="halfbyte-rows-", dir=roomy_folder(), buffering=WRITTEN_AT_ONCE
                )
            self._ends.append(self._end + self._file.write(self.encode(thing)))
        except OSError as error:
            raise no_room(roomy_folder(), error) from error
        self._flushed = False

    def extend(self, things: Iterable[T]) -> None:
        for thing in things:
            self.append(thing)

    def __len__(self) -> int:
        return len(self._first) + len(self._ends)

    def at(self, place: int) -> T:
        if place < len(self._first):
            return self._first[place]
        return self.decode(self.stored(place))

    def stored(self, place: int) -> bytes:
        """The thing at ``place`` as ``encode`` gives it."""
        if place < len(self._first):
            return self.encode(self._first[place])
        place -= len(self._first)
        begin = self._ends[place - 1] if place else 0
        return self._read(begin, self._ends[place])

    def each(self, places: Iterable[int]) -> Iterator[T]:
        kept, ends = len(self._first), self._ends
        window, start = b"", 0
        for place in places:
            if place < kept:
                yield self._first[place]
                continue
            end = ends[place - kept]
            begin = ends[place - kept - 1] if place > kept else 0
            if begin < start or end > start + len(window):
                start = begin
                window = self._read(begin, max(end, min(begin + READ_AT_ONCE, self._end)))
            yield self.decode(window[begin - start : end - start])

    @property
    def _end(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _read(self, begin: int, end: int) -> bytes:
        assert self._file is not None
        if not self._flushed:
            try:
                self._file.flush()
            except OSError as error:
                raise no_room(roomy_folder(), error) from error
            self._flushed = True
        return os.pread(self._file.fileno(), end - begin, begin)


def roomy_folder() -> Path:
    """Where large files that end with the process may lie: not in memory, as /tmp often does."""
    if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK | os.X_OK):
        return Path("/var/tmp")
    return Path(tempfile.gettempdir())


def no_room(folder: Path, error: OSError) -> DataError:
    """The error for rows that cannot be written to ``folder``."""
    return DataError(
        f"the rows do not fit into memory and cannot be written to {folder} "
        f"({error.strerror or error}); free some space there or set TMPDIR to another folder."
    )
