"""A long JSON list, read a window at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from halfbyte.foreign_json import require_shallow, too_deep

WINDOW = 1 << 20  # characters
# An error so many characters before the end of a window is none that reading on would mend.
NEAR_THE_END = 64

_SPACE = re.compile(r"[ \t\r\n]*")


class Windows:
    """JSON values of a text one after another, of which a window is in memory.

    JSONDecodeErrors name the line in the whole text; their ``doc`` is the window.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._lines = 0  # ended before the window
        self._ended = False

    def next(self) -> str:
        """The next character that is no space, which stays; empty at the end."""
        while True:
            at = self._behind_space()
            if at < len(self._text) or self._ended:
                return self._text[at : at + 1]
            self._read()

    def skip(self) -> None:
        """Go behind the next character that is no space."""
        self.next()
        self._at = self._behind_space() + 1

    def value(self) -> Any:
        """The next value; the place is then behind it."""
        decoder = json.JSONDecoder()
        self.next()
        while True:
            start = self._behind_space()
            try:
                value, end = decoder.raw_decode(self._text, start)
            except RecursionError:
                raise too_deep() from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or (
                    error.pos >= len(self._text) - NEAR_THE_END
                )
                if self._ended or not cut:
                    raise self._named(error) from None
                self._read()
                continue
            if end == len(self._text) and not self._ended:  # a number may go on
                self._read()
                continue
            require_shallow(value, self._text[start:end])
            self._at = end
            return value

    def refuse(self, message: str) -> json.JSONDecodeError:
        """The error for what stands at the place, spaces left out."""
        self.next()
        while len(self._text) - self._at < NEAR_THE_END and not self._ended:
            self._read()  # what stands there is shown
        where = self._behind_space()
        return self._named(json.JSONDecodeError(message, self._text, where))

    def rest(self) -> str:
        """All that follows the place."""
        return self._text[self._at :] + self._file.read()

    def peek(self) -> str:
        """What the window holds from the place on."""
        self.next()
        return self._text[self._at :]

    def _behind_space(self) -> int:
        """The place without the spaces there, as far as the window goes."""
        found = _SPACE.match(self._text, self._at)
        return found.end() if found else self._at

    def _read(self) -> None:
        """A further window; of what lies before the place nothing stays."""
        kept = self._text[self._at :]
        self._lines += self._text.count("\n", 0, self._at)
        # As much again as is there, so that a long value is not decoded too often.
        more = self._file.read(max(WINDOW, len(kept)))
        self._ended = not more
        self._text, self._at = kept + more, 0

    def _named(self, error: json.JSONDecodeError) -> json.JSONDecodeError:
        error.lineno += self._lines
        return error


def items(windows: Windows) -> Iterator[Any]:
    """The values of the list at the place, and that nothing follows it."""
    windows.skip()
    if windows.next() == "]":
        windows.skip()
    else:
        while True:
            yield windows.value()
            mark = windows.next()
            if mark == ",":
                windows.skip()
                continue
            if mark != "]":
                raise windows.refuse("Expecting ',' delimiter")
            windows.skip()
            break
    if windows.next():
        raise windows.refuse("Extra data")
