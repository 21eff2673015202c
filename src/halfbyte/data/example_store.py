"""Examples by their place: in memory while they are few, else in a file."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO, overload

from halfbyte.data.example import Example, Message

# An example takes about 1.5 KB of memory beside its text, and a file's pages are the system's.
KEPT = 50_000


class ExampleStore(Sequence[Example]):
    """Examples in the order in which they are added.

    From ``kept`` on they go to a temporary file without a name, which ends with this object: a
    million rows then take 8 MB of memory for their places. Those are read again when asked for.
    """

    def __init__(self, examples: Iterable[Example] = (), kept: int = KEPT) -> None:
        self._first: list[Example] = []
        self._kept = kept
        self._file: BinaryIO | None = None
        self._ends = array("Q")  # where the line of each example in the file ends
        self.extend(examples)

    def append(self, example: Example) -> None:
        if len(self._first) < self._kept:
            self._first.append(example)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="halfbyte-rows-")  # noqa: SIM115
        self._ends.append(self._end + self._file.write(_encode(example)))

    def extend(self, examples: Iterable[Example]) -> None:
        for example in examples:
            self.append(example)

    def __len__(self) -> int:
        return len(self._first) + len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._one(i) for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"there is no example {index} among {len(self)}")
        return self._one(place)

    def __iter__(self) -> Iterator[Example]:
        yield from self._first
        for place in range(len(self._first), len(self)):
            yield self._one(place)

    @property
    def _end(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _one(self, place: int) -> Example:
        if place < len(self._first):
            return self._first[place]
        assert self._file is not None
        place -= len(self._first)
        begin = self._ends[place - 1] if place else 0
        self._file.flush()
        return _decode(os.pread(self._file.fileno(), self._ends[place] - begin, begin))


def _encode(example: Example) -> bytes:
    """One line of JSON; what is as it is by default is left out."""
    fields = {k: getattr(example, k) for k, v in _FIELDS.items() if getattr(example, k) != v}
    if example.messages:
        fields["messages"] = [
            {k: v for k, v in asdict(message).items() if v not in (None, ())}
            for message in example.messages
        ]
    # Half a surrogate pair, which a row can hold, is written as JSON's escape.
    return json.dumps(fields, separators=(",", ":")).encode()


def _decode(line: bytes) -> Example:
    fields: dict[str, Any] = json.loads(line)
    messages = fields.pop("messages", [])
    for message in messages:
        if "tool_calls" in message:
            message["tool_calls"] = tuple(message["tool_calls"])
    if "tools" in fields:
        fields["tools"] = tuple(fields["tools"])
    if "turns" in fields:
        fields["turns"] = tuple(fields["turns"])
    return Example(messages=tuple(Message(**message) for message in messages), **fields)


_FIELDS: dict[str, Any] = {
    "row": None,
    "text": None,
    "instruction": None,
    "input": None,
    "tools": (),
    "source": 0,
    "turns": None,
}
