"""Tools of a conversation, and the calls that an assistant makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from halfbyte.data.formats.cells import Unreadable, from_json, is_missing, kind_of, without_nulls
from halfbyte.data.table import Cells


def calls_of(value: object, where: str, *, typed: bool) -> tuple[Mapping[str, Any], ...]:
    """The calls in ``value``: one or a list, as OpenAI has them or bare, or as their JSON.

    Each as ``{"name", "arguments"}``, and its ``id`` where it has one. Arguments that are the
    text of a JSON object become that object.
    """
    found = from_json(value)
    if is_missing(found):
        return ()
    calls = found if isinstance(found, (list, tuple)) else [found]
    return tuple(_call(from_json(call), where, typed=typed) for call in calls)


def _call(call: object, where: str, *, typed: bool) -> Mapping[str, Any]:
    if not isinstance(call, Mapping):
        raise Unreadable(f"{where} has a tool call that is {kind_of(call)} and not an object.")
    kind = call.get("type")
    if kind not in (None, "function"):
        raise Unreadable(f"{where} calls a tool of the type {kind}, and only functions are read.")
    function = call.get("function") or call
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise Unreadable(f"{where} has a tool call without a function's name.")
    arguments = function.get("arguments", function.get("parameters"))
    parsed = from_json(arguments)
    if is_missing(parsed):
        parsed = {}
    elif typed and not isinstance(arguments, str):
        parsed = without_nulls(parsed)
    elif not isinstance(parsed, Mapping):
        parsed = arguments
    said = {"name": name, "arguments": parsed}
    call_id = call.get("id")
    return {"id": call_id, **said} if isinstance(call_id, str) and call_id else said


def tools_of(cells: Cells, column: str | None, *, typed: bool) -> tuple[Mapping[str, Any], ...]:
    """The schemas in a column of tools: a list of objects, or of their JSON, or its JSON."""
    value = None if column is None else cells.get(column)
    found = from_json(value)
    if is_missing(found):
        return ()
    tools = [found] if isinstance(found, Mapping) else found
    if not isinstance(tools, (list, tuple)):
        raise Unreadable(f"column {column}: {kind_of(value)} that holds no JSON list of tools.")
    schemas: list[Mapping[str, Any]] = []
    for tool in tools:
        schema = from_json(tool)
        if not isinstance(schema, Mapping):
            raise Unreadable(f"column {column}: a tool is {kind_of(tool)} and no JSON schema.")
        schemas.append(without_nulls(schema) if typed and not isinstance(tool, str) else schema)
    return tuple(schemas)


def as_text(value: object) -> str:
    """What a tool gave back, as text: JSON unless it is a text already."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
