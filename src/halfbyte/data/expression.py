"""Regular expressions of recipes at work, in the worker of :mod:`halfbyte.data.template_process`.

A short expression can take longer than anybody waits (``(a+)+b`` in a text of forty ``a``), and
nothing stops Python's from within.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


class Expression:
    """A compiled expression. Raises what ``re`` does for one that is none."""

    def __init__(self, expression: str) -> None:
        self._compiled = re.compile(expression)

    def of(self, what: str, texts: Sequence[str], replacement: str | None = None) -> Any:
        """``match``: whether each of ``texts`` is one. ``search``: see :meth:`_search`."""
        if what == "match":
            return [self._compiled.fullmatch(text) is not None for text in texts]
        return self._search(texts, replacement)

    def _search(self, texts: Sequence[str], replacement: str | None) -> Any:
        """Place, begin and end of what is found first in ``texts``, and all texts with what is
        found replaced, where something is to replace it; None where nothing is found."""
        for place, text in enumerate(texts):
            found = self._compiled.search(text)
            if found is not None:
                mended = texts
                if replacement is not None:
                    mended = [self._compiled.sub(replacement, text) for text in texts]
                return [place, *found.span(), list(mended)]
        return None
