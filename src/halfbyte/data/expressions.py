"""What a recipe's regular expressions find, as the worker process finds it.

A recipe may be anybody's; see :mod:`halfbyte.data.expression`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from halfbyte.data.template_process import Failed, TemplateStopped, template_process
from halfbyte.errors import DataError


class RecipeExpression:
    """The expression of the setting ``key``. Raises DataError for one that is none."""

    def __init__(self, expression: str, key: str) -> None:
        self._source = {"expression": expression}
        self._where = f"the regular expression of {key}"
        text = expression.encode("utf-8", "surrogatepass")
        self._key = f"expression {hashlib.sha256(text).hexdigest()}"
        failed = template_process().open(self._key, **self._source)
        if failed is not None:
            raise DataError(f"{self._where} is none: {failed.words or failed.kind}.")

    def matches(self, texts: Sequence[str]) -> list[bool]:
        """Whether each of ``texts`` is, from its beginning to its end, what is looked for."""
        [found] = self._ask([("match", list(texts))], [""])
        return [bool(one) for one in found]

    def search(
        self, each: Sequence[Sequence[str]], replacement: str | None, names: Sequence[str]
    ) -> list[tuple[int, int, int, list[str]] | None]:
        """Of each of some rows, which are texts: where something is found first (the text's place,
        begin and end), and the texts with it replaced. ``names`` say where each row stands."""
        found = self._ask([("search", list(texts), replacement) for texts in each], names)
        return [None if one is None else (one[0], one[1], one[2], one[3]) for one in found]

    def _ask(self, work: list[Any], names: Sequence[str]) -> list[Any]:
        try:
            found = template_process().render({self._key: self._source}, self._key, work)
        except TemplateStopped as stopped:
            at = names[min(stopped.place, len(names) - 1)]
            where = f"{self._where}, at {at}," if at else self._where
            raise TemplateStopped(stopped.what, stopped.place, where) from None
        for one in found:
            if isinstance(one, Failed):
                raise DataError(f"{self._where} cannot be used: {one.words or one.kind}.")
        return found
