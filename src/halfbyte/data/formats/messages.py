"""Conversations: OpenAI's ``messages`` (role, content) and ShareGPT's (from, value).

What one message is, key by key. Either pair of keys is read in either format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from halfbyte.data.example import Message
from halfbyte.data.formats.cells import Unreadable, from_json, is_missing, kind_of
from halfbyte.data.formats.tool_calls import as_text, calls_of

# What datasets call who speaks, in lower case.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
# Whose text is the call itself.
CALLING = ("function_call", "tool_call")
REASONING = ("reasoning_content", "reasoning", "thinking")
FLAGS = ("train", "weight", "learn")
# Keys of a message that change what it says, and that no model of texts can read.
UNREAD = ("images", "image", "audio", "video", "refusal", "train_detail", "training_detail")


def looks_like_messages(cell: object) -> bool:
    """Whether a cell is a list of messages, or its JSON."""
    if isinstance(cell, str) and '"role"' not in cell and '"from"' not in cell:
        return False
    listed = _listed(from_json(cell))
    if not isinstance(listed, (list, tuple)) or not listed:
        return False
    first = listed[0]
    if not isinstance(first, Mapping) or not ("role" in first or "from" in first):
        return False
    return not first.keys().isdisjoint(("content", "value", "tool_calls", "function_call"))


def speaks_sharegpt(cell: object) -> bool:
    """Whether the messages of a cell have ``from`` and ``value``."""
    listed = _listed(from_json(cell))
    return bool(listed) and isinstance(listed, (list, tuple)) and "from" in listed[0]


def read_messages(cell: object, column: str, *, typed: bool) -> list[Message]:
    """The messages of a cell: a list of objects, or its JSON; none where the cell is empty.

    Raises Unreadable, which counts messages from 1, for what is no conversation in text.
    """
    if is_missing(cell):
        return []
    listed = _listed(from_json(cell))
    if not isinstance(listed, (list, tuple)):
        raise Unreadable(f"column {column}: {kind_of(cell)} that is no list of messages.")
    return [_message(item, number, column, typed) for number, item in enumerate(listed, start=1)]


def _listed(cell: object) -> object:
    """`datasets` may store a list of objects as an object of lists, all of one length."""
    if isinstance(cell, Mapping) and cell and all(isinstance(v, list) for v in cell.values()):
        columns = list(cell.values())
        if len({len(column) for column in columns}) == 1:
            return [dict(zip(cell, row, strict=True)) for row in zip(*columns, strict=True)]
    return cell


def _message(item: object, number: int, column: str, typed: bool) -> Message:
    if not isinstance(item, Mapping):
        raise Unreadable(f"column {column}: message {number} is {kind_of(item)} and not an object.")
    said = item.get("role")
    if said is None:
        said = item.get("from")
    content = item.get("content")
    if content is None:
        content = item.get("value")
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is not None and len(item) == 2 and isinstance(content, str) and said not in CALLING:
        return Message(role, content)
    return _full_message(item, said, content, f"column {column}: message {number}", typed)


def _full_message(
    item: Mapping[str, Any], said: object, content: object, where: str, typed: bool
) -> Message:
    """A message with more than a role and a text."""
    if said is None:
        raise Unreadable(f"{where} does not say who speaks; it has {', '.join(item) or 'no keys'}.")
    spoken = str(said).strip().lower()
    role = ROLES.get(spoken)
    if role is None:
        raise Unreadable(
            f"{where} has the role {str(said)[:40]!r}, which is none of system, user, assistant "
            "and tool nor another name of one."
        )
    for key in UNREAD:
        if not is_missing(item.get(key)):
            raise Unreadable(f"{where} has {key}, which is not read; only text is trained.")
    calls = item.get("tool_calls") or item.get("function_call")
    if spoken in CALLING:
        calls, content = content, ""
    tool_calls = calls_of(calls, where, typed=typed)
    if spoken in CALLING and not tool_calls:
        raise Unreadable(f"{where} has the role {spoken} and holds no call.")
    if tool_calls and role != "assistant":
        raise Unreadable(f"{where} calls a tool, and only an assistant does; its role is {role}.")
    reasoning = next((item[key] for key in REASONING if not is_missing(item.get(key))), None)
    text, thought = _text(content, where, role, may_be_none=bool(tool_calls or reasoning))
    reasoning = reasoning if thought is None else thought
    if reasoning is not None and not isinstance(reasoning, str):
        raise Unreadable(f"{where} has reasoning that is {kind_of(reasoning)} and not a text.")
    call_id, name = item.get("tool_call_id"), item.get("name")
    return Message(
        role,
        text,
        learn=_learn(item, where),
        reasoning=reasoning if role == "assistant" else None,
        tool_calls=tool_calls,
        tool_call_id=call_id if isinstance(call_id, str) else None,
        name=name if isinstance(name, str) else None,
    )


def _text(content: object, where: str, role: str, *, may_be_none: bool) -> tuple[str, str | None]:
    """A content as text, and the thinking among its parts."""
    if isinstance(content, str):
        return content, None
    if content is None:
        if may_be_none:
            return "", None
        raise Unreadable(f"{where} has no content.")
    if isinstance(content, (list, tuple)) and all(_is_part(part) for part in content):
        return _parts(content, where)
    if role == "tool":
        return as_text(content), None
    raise Unreadable(f"{where} has a content that is {kind_of(content)} where a text is needed.")


def _is_part(part: object) -> bool:
    return isinstance(part, str) or (
        isinstance(part, Mapping) and isinstance(part.get("type"), str)
    )


def _parts(parts: Sequence[Any], where: str) -> tuple[str, str | None]:
    """The texts of a content's parts, one after another: nothing is put between them."""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part["type"]
        held = part.get("text") if kind in ("text", "input_text", "output_text") else None
        if isinstance(held, str):
            texts.append(held)
        elif kind in ("thinking", "reasoning"):
            thoughts.append(str(part.get("thinking") or part.get(kind) or part.get("text") or ""))
        else:
            what = "without its text" if kind.endswith("text") else "and only text is trained"
            raise Unreadable(f"{where} has a part of the type {kind}, {what}.")
    return "".join(texts), "".join(thoughts) or None


def _learn(item: Mapping[str, Any], where: str) -> bool | None:
    """What a message says of whether it is learned: true or false, 1 or 0."""
    said: bool | None = None
    for key in FLAGS:
        value = item.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise Unreadable(f"{where} has the {key} {value!r}, which is neither 1 nor 0.")
        if said is not None and said != bool(value):
            raise Unreadable(f"{where} says by {' and '.join(FLAGS)} both to learn it and not to.")
        said = bool(value)
    return said


def with_learn(messages: Sequence[Message], learn: bool) -> list[Message]:
    """The messages, those of an assistant that do not say for themselves flagged."""
    return [
        replace(message, learn=learn)
        if message.role == "assistant" and message.learn is None
        else message
        for message in messages
    ]
