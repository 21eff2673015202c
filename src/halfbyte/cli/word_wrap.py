"""Lines broken between words, for text that comes piece by piece."""

from __future__ import annotations

import re
from collections.abc import Callable

from rich.cells import cell_len


class WordWrap:
    """Writes text so that a terminal of ``width`` columns need not cut a word in two.

    A word is held back until its end is known. Scripts written without spaces are wide characters
    and may be cut anywhere, so those are written at once; so is a word longer than a line.
    ``column`` is where the first text begins.
    """

    def __init__(self, write: Callable[[str], object], width: int, column: int = 0) -> None:
        self._write = write
        self._width = width
        self._column = column
        self._word = ""

    def push(self, text: str) -> None:
        """Write what is complete with ``text``."""
        for part in re.split(r"(\s)", text):
            if part.isspace():
                self._end_word()
                self._space(part)
                continue
            for character in part:
                self._word += character
                if cell_len(character) > 1 or len(self._word) > self._width:
                    self._end_word()

    def end(self) -> None:
        """Write the last word."""
        self._end_word()

    def _end_word(self) -> None:
        cells = cell_len(self._word)
        if self._column and self._column + cells > self._width:
            self._write("\n")
            self._column = 0
        if self._word:
            self._write(self._word)
            self._column += cells
            if self._column > self._width:  # longer than a line: the terminal cuts it
                self._column %= self._width
            self._word = ""

    def _space(self, space: str) -> None:
        text = "    " if space == "\t" else " "
        if space == "\n" or self._column + len(text) >= self._width:
            self._write("\n")  # at the end of a line it stands for the space
            self._column = 0
        else:
            self._write(text)
            self._column += len(text)
