"""Rows of any columns, made by the Jinja templates of the recipe."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from halfbyte.data.example import Example, Message
from halfbyte.data.formats.cells import Unreadable
from halfbyte.data.formats.format import Origin
from halfbyte.data.table import Cells
from halfbyte.errors import DataError
from halfbyte.recipe.data_schema import JinjaRecipe

NAMES = ("system", "user", "assistant", "text")


class JinjaRows:
    """Templates that see each column under its name, and all of them as ``row``.

    A cell that holds nothing, or that a row lacks, is written as an empty text; a column that the
    table does not have is an error.
    """

    name = "jinja"

    def __init__(self, recipe: JinjaRecipe, columns: Sequence[str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, finalize=_nothing_is_empty
        )
        self.reason: dict[str, str] = {}
        self._blank = dict.fromkeys(columns)
        self._templates: dict[str, jinja2.Template] = {}
        for name in NAMES:
            source = getattr(recipe, name)
            if source is None:
                continue
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise DataError(
                    f"data.jinja.{name}, line {error.lineno}: this is no Jinja template "
                    f"({_first_line(error)})."
                ) from error

    @property
    def makes_texts(self) -> bool:
        """Whether a row is one text and no question."""
        return "text" in self._templates

    def by_role(self) -> dict[str, str]:
        return {}

    def example(self, cells: Cells, row: int, origin: Origin) -> Example:
        if len(cells) < len(self._blank):
            cells = {**self._blank, **cells}
        made = {name: self._render(name, cells) for name in self._templates}
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

    def _render(self, name: str, cells: Cells) -> str:
        try:
            return self._templates[name].render({"row": cells, **cells})
        except jinja2.UndefinedError as error:
            raise Unreadable(
                f"data.jinja.{name}: {_first_line(error)}{self._nearest(error)}; the columns are "
                f"{', '.join(self._blank)}."
            ) from error
        except Exception as error:  # a template computes, and so raises, whatever it likes
            raise Unreadable(
                f"data.jinja.{name} cannot be rendered: {_first_line(error)}."
            ) from error

    def _nearest(self, error: Exception) -> str:
        words = str(error).split("'")
        near = difflib.get_close_matches(words[-2] if len(words) > 2 else "", self._blank, n=1)
        return f" (did you mean {near[0]}?)" if near else ""


def _nothing_is_empty(value: Any) -> Any:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else value


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
