"""A file of prompts that somebody wrote to ask models with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import DataError
from halfbyte.foreign_json import parse_json, read_small

Messages = Sequence[dict[str, str]]
MOST_BYTES = 16 << 20
_ROLES = ("system", "user", "assistant")
# Names that a prompt has in a row of JSONL, in the order in which they are looked for.
_NAMES = ("prompt", "question", "instruction", "text")


def read_prompts(path: Path) -> list[tuple[str, Messages]]:
    """The prompts of ``path``, each with what to call it and its messages, the last the user's.

    In a ``.jsonl`` file each line is a text, or an object with ``messages`` or a ``prompt``; an
    answer at the end of the messages is left out. In any other file each paragraph is a prompt,
    that is what stands between empty lines. Raises DataError for a file without prompts, and for a
    line that is none.
    """
    try:
        text = read_small(path, MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"the prompts {path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the prompts {path} are not UTF-8 text; save them as that.") from error
    except ValueError as error:
        raise DataError(f"the prompts {path} cannot be read: {error}.") from error
    found = _of_lines(path, text) if path.suffix.lower() == ".jsonl" else _paragraphs(text)
    if not found:
        raise DataError(f"{path} holds no prompt; write one, or several between empty lines.")
    return found


def _paragraphs(text: str) -> list[tuple[str, Messages]]:
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            parts[-1].append(line.rstrip())
        elif parts[-1]:
            parts.append([])
    return [
        (f"prompt {number}", [{"role": "user", "content": "\n".join(lines)}])
        for number, lines in enumerate((part for part in parts if part), 1)
    ]


def _of_lines(path: Path, text: str) -> list[tuple[str, Messages]]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append((f"line {number}", _messages(parse_json(line))))
            except ValueError as error:
                raise DataError(
                    f"line {number} of {path} is no prompt ({error}); write a text, or an object "
                    'with "prompt" or "messages".'
                ) from error
    return found


def _messages(value: Any) -> Messages:
    if isinstance(value, Mapping) and "messages" in value:
        return read_messages(value["messages"])
    if isinstance(value, Mapping):
        value = next((value[name] for name in _NAMES if name in value), None)
    if not isinstance(value, str) or not value.strip():
        raise ValueError("it has no text")
    return [{"role": "user", "content": value}]


def read_messages(value: Any) -> Messages:
    """Messages up to the last that the user wrote. Raises ValueError for what are none."""
    if not isinstance(value, list):
        raise ValueError("its messages are no list")
    found = []
    for one in value:
        if not isinstance(one, Mapping) or one.get("role") not in _ROLES:
            raise ValueError(f"a message's role is none of {', '.join(_ROLES)}")
        if not isinstance(one.get("content"), str):
            raise ValueError("a message has no text")
        found.append({"role": str(one["role"]), "content": str(one["content"])})
    while found and found[-1]["role"] != "user":
        found.pop()
    if not found or not found[-1]["content"].strip():
        raise ValueError("it has no message of a user")
    return found
