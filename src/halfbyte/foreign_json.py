"""JSON that somebody else wrote: read as values, and refused where it is made to do harm.

What Python's reader takes without a word, and what is refused here with a ``ValueError``: values so
deep in one another that the next thing to walk them would run out of stack, and a file that is none
(a pipe that never answers, a device that never ends) or larger than any such file is.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

# A tool's description in a row is some ten deep, a configuration three.
DEEPEST = 100
# The index of a model of a thousand billion parameters takes ten.
MAX_BYTES = 64 << 20


def parse_json(text: str | bytes) -> Any:
    """The value that ``text`` is the JSON of.

    Raises ValueError (JSONDecodeError, where it is no JSON) for what is refused.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise too_deep() from None
    require_shallow(value, text)
    return value


def require_shallow(value: Any, text: str | bytes) -> None:
    """Raise ValueError where ``value``, read from ``text``, is more than DEEPEST deep."""
    if isinstance(text, bytes):
        openings = text.count(b"[") + text.count(b"{")
    else:
        openings = text.count("[") + text.count("{")
    if openings <= DEEPEST:
        return
    within = [value]
    for _ in range(DEEPEST + 1):
        within = [inner for outer in within for inner in _inside(outer)]
        if not within:
            return
    raise too_deep()


def too_deep() -> ValueError:
    return ValueError(f"it is nested more than {DEEPEST} deep")


def _inside(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def read_json(path: Path) -> Any:
    """The value in the file ``path``.

    Raises OSError where it cannot be read and ValueError for what is refused.
    """
    return parse_json(read_small(path).decode("utf-8"))


def read_small(path: Path, most: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most ``most``.

    Raises OSError where it cannot be read, ValueError where it is another kind of file or larger.
    """
    # Without waiting for whoever is to write into a pipe.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ValueError("it is no regular file")
        found = file.read(most + 1)
    if len(found) > most:
        raise ValueError(f"it is larger than {most >> 20} MB")
    return found
