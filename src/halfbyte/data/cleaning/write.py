"""Cleaned rows as a data file."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halfbyte.data.example import Example, Message
from halfbyte.errors import DataError


def write_cleaned(path: Path | str, examples: Iterable[Example]) -> int:
    """Write ``examples`` as JSONL, each in the shape that it was read in; returns their number.

    Instruction, input and output; or messages with their tools; or text. The file is there whole
    or as it was. Raises DataError where it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Half a surrogate pair, which UTF-8 refuses, is written as JSON's escape.
            with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
                for example in examples:
                    file.write(json.dumps(row_of(example), ensure_ascii=False) + "\n")
                    count += 1
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); name another file or free some space."
        ) from error
    return count


def row_of(example: Example) -> dict[str, Any]:
    """``example`` as a row of a file."""
    if example.text is not None:
        return {"text": example.text}
    if example.instruction is not None:
        system = {m.role: m.content for m in example.messages if m.role == "system"}
        row = {**system, "instruction": example.instruction, "input": example.input or ""}
        return {**row, "output": example.answer}
    whole: dict[str, Any] = {"messages": [_message(message) for message in example.messages]}
    if example.tools:
        whole["tools"] = [dict(tool) for tool in example.tools]
    return whole


def _message(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        row["reasoning_content"] = message.reasoning
    if message.tool_calls:
        row["tool_calls"] = [
            {"type": "function", "function": dict(call)} for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        row["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        row["name"] = message.name
    if message.learn is not None:
        row["weight"] = int(message.learn)
    return row
