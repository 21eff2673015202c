"""JSON and JSONL files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from halfbyte.data.json_list import Windows, items
from halfbyte.data.table import Cells, CellStore, Table
from halfbyte.data.text_file import encoding_of, open_text, sha256_of
from halfbyte.errors import DataError
from halfbyte.foreign_json import parse_json


def read_jsonl(path: Path, limit: int | None) -> Table:
    """An object a line; empty lines are passed over. A DataError names the line."""
    rows = CellStore()
    columns: dict[str, None] = {}
    with open_text(path, _encoding(path), "\n") as file:
        for number, line in enumerate(_lines(path, file), start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {_what(error, line)}.") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: a row is an object in braces, not {_kind(row)}."
                )
            _add(row, rows, columns)
            if len(rows) == limit:
                break
    return Table(list(columns), rows, sha256_of(path))


def read_json(path: Path, limit: int | None) -> Table:
    """A list of objects, or an object in which one member is such a list.

    A list is read a window at a time; of an object all is in memory at once.
    """
    encoding = encoding_of(path)
    if encoding is None:
        raise _not_utf8(path, "utf-8")
    with open_text(path, encoding, "\n") as file:
        windows = Windows(file)
        try:
            first = windows.next()
            if not first:
                return Table([], [])
            if first == "[":
                return _read_list(path, windows, limit)
            if first == "{" and _begins_with_lines(windows.peek()):
                return read_jsonl(path, limit)  # one object a line under the name .json
            rows = _list_within(path, parse_json(windows.rest()))[:limit]
        except UnicodeDecodeError:
            raise _not_utf8(path, encoding) from None
        except json.JSONDecodeError as error:
            if error.msg == "Extra data" and first == "{":
                return read_jsonl(path, limit)
            raise DataError(f"{path}, line {error.lineno}: {_what(error, error.doc)}.") from error
        except ValueError as error:
            raise DataError(f"{path}: {_what(error, '')}.") from error
    return Table(columns_of(rows), rows, sha256_of(path))


def columns_of(rows: Iterable[Cells]) -> list[str]:
    """The names that occur in any row, in the order of their first occurrence."""
    names: dict[str, None] = {}
    for row in rows:
        if row.keys() - names.keys():
            names.update(dict.fromkeys(row))
    return list(names)


def _add(row: Cells, rows: CellStore, columns: dict[str, None]) -> None:
    if row.keys() - columns.keys():
        columns.update(dict.fromkeys(row))
    rows.append(row)


def _read_list(path: Path, windows: Windows, limit: int | None) -> Table:
    """The first rows of the list at the place; what follows them is not looked at."""
    rows = CellStore()
    columns: dict[str, None] = {}
    for row in items(windows):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {len(rows) + 1}: a row is an object in braces, not {_kind(row)}."
            )
        _add(row, rows, columns)
        if len(rows) == limit:
            break
    return Table(list(columns), rows, sha256_of(path))


def _begins_with_lines(text: str) -> bool:
    """Whether the first line of ``text`` is a JSON value of its own, and something follows it."""
    line, _, more = text.strip().partition("\n")
    try:
        parse_json(line)
    except ValueError:
        return False
    return bool(more.strip())


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


def _not_utf8(path: Path, encoding: str) -> DataError:
    """The error for a file that is not all ``encoding``, with the place of the first such byte."""
    try:
        with open_text(path, encoding, "\n") as file:
            file.read()
    except UnicodeDecodeError as error:
        where = f" (byte {error.start:,})"
    else:
        where = ""
    return DataError(f"{path} is not UTF-8{where}; save the file as UTF-8.")


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
