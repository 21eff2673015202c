"""Pieces of the one sentence that an error is."""

from __future__ import annotations

from collections.abc import Iterable


def reason(error: BaseException, limit: int = 240) -> str:
    """What ``error`` says, on one line and without its full stop."""
    text = " ".join(str(error).split()).rstrip(".: ")
    if len(text) > limit:
        text = text[:limit].rsplit(" ", 1)[0] + " …"
    return text or type(error).__name__


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few of ``names`` and how many more there are."""
    names = list(names)
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
