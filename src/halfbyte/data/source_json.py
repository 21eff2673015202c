"""JSON and JSONL files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from halfbyte.data.table import Cells, Table
from halfbyte.data.text_file import encoding_of, open_text, sha256_of
from halfbyte.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")


def read_jsonl(path: Path, limit: int | None) -> Table:
    """An object a line; empty lines are passed over. A DataError names the line."""
    rows: list[Cells] = []
    with open_text(path, _encoding(path), "\n") as file:
        for number, line in enumerate(_lines(path, file), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {_what(error, line)}.") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: a row is an object in braces, not {_kind(row)}."
                )
            rows.append(row)
            if len(rows) == limit:
                break
    return Table(columns_of(rows), rows, sha256_of(path))


def read_json(path: Path, limit: int | None) -> Table:
    """A list of objects, or an object in which one member is such a list."""
    with open_text(path, _encoding(path), "\n") as file:
        text = _read(path, file)
    start = _space(text, 0)
    if start == len(text):
        return Table([], [])
    try:
        if text[start] == "[":
            rows = _read_list(path, text, start, limit)
        else:
            whole = json.loads(text)
            rows = _list_within(path, whole)[:limit]
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[start] == "{":
            # One object a line under the name .json.
            return read_jsonl(path, limit)
        raise DataError(f"{path}, line {error.lineno}: {_what(error, text)}.") from error
    return Table(columns_of(rows), rows, sha256_of(path))


def columns_of(rows: Iterable[Cells]) -> list[str]:
    """The names that occur in any row, in the order of their first occurrence."""
    names: dict[str, None] = {}
    for row in rows:
        if row.keys() - names.keys():
            names.update(dict.fromkeys(row))
    return list(names)


def _read_list(path: Path, text: str, at: int, limit: int | None) -> list[Cells]:
    """The first rows of the list that begins at ``at``; what follows them is not looked at."""
    decoder = json.JSONDecoder()
    rows: list[Cells] = []
    at = _space(text, at + 1)
    if text[at : at + 1] == "]":
        return rows
    while True:
        row, end = decoder.raw_decode(text, at)
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {len(rows) + 1}: a row is an object in braces, not {_kind(row)}."
            )
        rows.append(row)
        if len(rows) == limit:
            return rows
        at = _space(text, end)
        if text[at : at + 1] == "]":
            if _space(text, at + 1) != len(text):
                raise json.JSONDecodeError("Extra data", text, at + 1)
            return rows
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _space(text, at + 1)


def _list_within(path: Path, whole: Any) -> list[Cells]:
    lists = {}
    if isinstance(whole, dict):
        lists = {
            name: value
            for name, value in whole.items()
            if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
        }
    if len(lists) != 1:
        found = f"lists of rows under {', '.join(lists)}" if lists else "no list of objects"
        raise DataError(
            f"{path} holds {found}; a JSON file of rows is a list of objects, or an object with "
            "one such list."
        )
    return next(iter(lists.values()))


def _encoding(path: Path) -> str:
    # JSON is UTF-8 unless a mark says otherwise, so what is not is found where it is read.
    return encoding_of(path) or "utf-8"


def _lines(path: Path, file: Iterable[str]) -> Iterator[str]:
    number = 0
    try:
        for line in file:
            number += 1
            yield line
    except UnicodeDecodeError as error:
        # The file is decoded some lines ahead of the one that is handed out.
        raise DataError(
            f"{path}, after line {number}: this is not UTF-8; save the file as UTF-8."
        ) from error


def _read(path: Path, file: Any) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start:,}); save the file as UTF-8."
        ) from error


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _what(error: ValueError, text: str) -> str:
    """What the JSON reader found wrong, and the text there."""
    if not isinstance(error, json.JSONDecodeError):
        return f"this is not JSON ({error})"
    near = text[error.pos : error.pos + 25].split("\n")[0]
    where = f" at {near!r}" if near else " where the text ends"
    return f"this is not JSON ({error.msg[0].lower()}{error.msg[1:]}{where})"


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
