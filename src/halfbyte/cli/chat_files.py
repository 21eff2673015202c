"""A conversation in a file: Markdown to be read, JSONL to be gone on with or trained on."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import DataError, RunError
from halfbyte.foreign_json import parse_json, read_small
from halfbyte.generate.conversation import Conversation, Turn

JSONL = ".jsonl"
MARKDOWN = (".md", ".markdown")
MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class Loaded:
    """A conversation out of a file that holds ``of`` of them."""

    system: str | None
    turns: Sequence[Turn]
    open_message: str | None  # the last message, where it has no answer
    of: int


def save_conversation(path: Path, conversation: Conversation, model: str) -> Path:
    """Write ``conversation`` and return where: ``path``, or the next free name beside it.

    JSONL has one row ``{"messages": […]}``, which ``halfbyte train`` reads; where every message
    stands alone it has one for each. Raises RunError for a name that ends in neither, for a
    conversation of nothing, and where the file cannot be written.
    """
    turns = conversation.said
    if not turns:
        raise RunError("there is nothing to save yet.")
    suffix = path.suffix.lower()
    if suffix == JSONL:
        text = _rows(conversation)
    elif suffix in MARKDOWN:
        text = _markdown(turns, conversation.system, model)
    else:
        raise RunError(f"{path.name} ends in neither .md nor .jsonl; give it a name that does.")
    if "\0" in str(path):
        raise RunError("a file's name cannot have a null character.")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        return _publish(partial, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}).") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _publish(partial: Path, path: Path) -> Path:
    """Give ``partial`` the name ``path``, or the next that no file has."""
    number = 1
    while True:
        wanted = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            # A link fails where the name is taken, and a renaming would replace what has it.
            os.link(partial, wanted)
            return wanted
        except FileExistsError:
            number += 1
        except OSError:
            if not os.path.lexists(wanted):  # a file system without links
                os.replace(partial, wanted)
                return wanted
            number += 1


def _rows(conversation: Conversation) -> str:
    turns = conversation.said
    parts = [[turn] for turn in turns] if conversation.single_turn else [turns]
    return "".join(
        json.dumps({"messages": _messages(conversation.system, part)}, ensure_ascii=False) + "\n"
        for part in parts
    )


def _messages(system: str | None, turns: Sequence[Turn]) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.said})
        messages.append({"role": "assistant", "content": turn.answered})
    return messages


def _markdown(turns: Sequence[Turn], system: str | None, model: str) -> str:
    lines = [f"# A conversation with {model}", ""]
    if system is not None:
        lines += ["## System", "", system, ""]
    for turn in turns:
        lines += ["## You", "", turn.said, "", f"## {turn.by or 'model'}", "", turn.answered, ""]
    return "\n".join(lines)


def load_conversation(path: Path, *, all_rows: bool) -> Loaded:
    """The conversation in a JSONL file, the last of several; with ``all_rows`` the turns of all.

    Raises DataError for a file that cannot be read and a row that is no conversation of a user and
    an assistant.
    """
    if path.suffix.lower() != JSONL:
        raise DataError(f"{path.name} is not .jsonl, the form that a conversation is loaded from.")
    try:
        text = read_small(path, MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(_conversation(parse_json(line)))
            except ValueError as error:
                raise DataError(f"line {number} of {path} is no conversation: {error}.") from error
    if not found:
        raise DataError(f"{path} holds no conversation.")
    system, turns, message = found[-1]
    if all_rows:
        return Loaded(system, [turn for _, part, _ in found for turn in part], message, 1)
    return Loaded(system, turns, message, len(found))


def _conversation(row: Any) -> tuple[str | None, list[Turn], str | None]:
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("it has no messages")
    said = [_text(message) for message in messages]
    system = said.pop(0)[1] if said[0][0] == "system" else None
    wanted = ("user", "assistant")
    if any(role != wanted[place % 2] for place, (role, _) in enumerate(said)) or not said:
        raise ValueError("user and assistant do not take turns in it")
    texts = [text for _, text in said]
    turns = [Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=False)]
    return system, turns, texts[-1] if len(texts) % 2 else None


def _text(message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
        raise ValueError("a message of it has no text")
    return str(message.get("role")), message["content"]
