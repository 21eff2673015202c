"""Rows of any columns, made by the Jinja templates of the recipe."""

from __future__ import annotations

import difflib
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

from halfbyte.data.example import Example, Message
from halfbyte.data.formats.cells import Unreadable
from halfbyte.data.formats.format import Origin
from halfbyte.data.table import Cells
from halfbyte.data.template_process import (
    BATCH,
    BATCH_CHARACTERS,
    Failed,
    TemplateStopped,
    template_process,
)
from halfbyte.errors import DataError
from halfbyte.recipe.data_schema import JinjaRecipe

NAMES = ("system", "user", "assistant", "text")
# What a template may be given as it is; of anything else it sees the text.
_PLAIN = {str, int, float, bool, bytes, type(None), datetime}
_PLAIN_MODULES = ("datetime", "decimal")

# Of a row the text of each template, or why there is none.
_Made = dict[str, str] | Failed


class JinjaRows:
    """Templates that see each column under its name, and all of them as ``row``.

    A cell that holds nothing, or that a row lacks, is written as an empty text; a column that the
    table does not have is an error. They come with a recipe, which may be anybody's, and are
    rendered in the worker process.
    """

    name = "jinja"

    def __init__(self, recipe: JinjaRecipe, columns: Sequence[str]) -> None:
        self.reason: dict[str, str] = {}
        self._columns = list(dict.fromkeys(columns))
        self._sources: dict[str, dict[str, Any]] = {}  # key of the worker: what it compiles
        self._keys: list[tuple[str, str]] = []  # name, key
        self._waiting: deque[tuple[Cells, _Made]] = deque()
        for name in NAMES:
            source = getattr(recipe, name)
            if source is None:
                continue
            template = {"source": source, "columns": self._columns}
            text = repr((name, template)).encode("utf-8", "surrogatepass")
            key = hashlib.sha256(text).hexdigest()
            failed = template_process().open(key, **template)
            if failed is not None:
                line = "" if failed.line is None else f", line {failed.line}"
                raise DataError(
                    f"data.jinja.{name}{line}: this is no Jinja template ({_first_line(failed)})."
                )
            self._sources[key] = template
            self._keys.append((name, key))

    @property
    def makes_texts(self) -> bool:
        """Whether a row is one text and no question."""
        return any(name == "text" for name, _ in self._keys)

    def by_role(self) -> dict[str, str]:
        return {}

    def prepared(self, rows: Iterable[Cells]) -> Iterator[Cells]:
        """The rows, rendered many at once; ``example`` then has what was made of each.

        Raises TemplateStopped with the number of the row as its place.
        """
        rows, done = iter(rows), 0
        while batch := _batch(rows):
            try:
                made = self._rendered(batch)
            except TemplateStopped as stopped:
                raise TemplateStopped(stopped.what, done + stopped.place) from None
            done += len(batch)
            self._waiting.extend(zip(batch, made, strict=True))
            yield from batch

    def example(self, cells: Cells, row: int, origin: Origin) -> Example:
        if self._waiting and self._waiting[0][0] is cells:
            _, found = self._waiting.popleft()
        else:
            [found] = self._rendered([cells])
        if isinstance(found, Failed):
            raise self._unreadable(found)
        made = found
        if "text" in made:
            return Example(row, text=made["text"], source=origin.number)
        answer = Message("assistant", made["assistant"])
        system = made.get("system", "").strip()
        return Example(
            row,
            (Message("system", system), answer) if system else (answer,),
            instruction=made["user"],
            input="",
            source=origin.number,
        )

    def _rendered(self, rows: Sequence[Cells]) -> list[_Made]:
        work = [_plain(cells) for cells in rows]
        return template_process().render(self._sources, tuple(self._keys), work)

    def _unreadable(self, failed: Failed) -> Unreadable:
        name, _, kind = failed.kind.partition(" ")
        words = _first_line(failed)
        if kind == "UndefinedError":
            near = self._nearest(failed.words)
            return Unreadable(
                f"data.jinja.{name}: {words}{near}; the columns are {', '.join(self._columns)}."
            )
        return Unreadable(f"data.jinja.{name} cannot be rendered: {words}.")

    def _nearest(self, said: str) -> str:
        words = said.split("'")
        near = difflib.get_close_matches(words[-2] if len(words) > 2 else "", self._columns, n=1)
        return f" (did you mean {near[0]}?)" if near else ""


def _batch(rows: Iterator[Cells]) -> list[Cells]:
    found: list[Cells] = []
    characters = 0
    for cells in islice(rows, BATCH):
        found.append(cells)
        characters += sum(len(cell) for cell in cells.values() if isinstance(cell, (str, list)))
        if characters > BATCH_CHARACTERS:
            break
    return found


def _plain(value: Any) -> Any:
    """``value`` without the types of other packages: nothing of them is to be had in a template."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if type(value).__module__ in _PLAIN_MODULES:
        return value
    if isinstance(value, datetime):  # pandas', which Arrow gives where there are nanoseconds
        return datetime.fromisoformat(value.isoformat(timespec="microseconds"))
    return str(value)


def _first_line(failed: Failed) -> str:
    lines = failed.words.strip().splitlines()
    return lines[0].rstrip(".") if lines else failed.kind.rpartition(" ")[2]
