"""Cells of a row as what a format needs: texts, and lists and objects that may come as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any

from halfbyte.foreign_json import parse_json


class Unreadable(Exception):
    """What is wrong with a row, to follow the words for where the row stands."""


def is_missing(value: object) -> bool:
    """Whether a cell says nothing: None, NaN, an empty text, list or object."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)


def text_of(value: object, column: str) -> str:
    """A cell as text: nothing for None and NaN, ``true``, ``3``, ``2.5``.

    Raises Unreadable for a list, an object or bytes.
    """
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, Decimal, date, time)):
        return str(value)
    raise Unreadable(
        f"column {column}: the cell holds {kind_of(value)} where a text is needed; name another "
        "column in data.columns or write its text out."
    )


def kind_of(value: object) -> str:
    """What a value is, in words: ``a list``."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, bool):
        return "true or false"
    names: list[tuple[type | tuple[type, ...], str]] = [
        ((list, tuple), "a list"),
        (str, "a text"),
        ((int, float, Decimal), "a number"),
        (bytes, "bytes"),
    ]
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


def from_json(value: object) -> object:
    """A text that is a JSON list or object as that list or object; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def without_nulls(value: Any) -> Any:
    """A list or object without the keys whose value is None, at any depth.

    Parquet and Arrow give all objects of a column the keys of all, so that there None is a key
    that the row does not have.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
