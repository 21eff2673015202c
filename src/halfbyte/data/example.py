"""A row of any format, before it is rendered: a conversation, or a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    ``learn`` is the row's own word on whether an assistant's message is learned, None where it has
    none. ``reasoning`` is what an assistant thought before it answered. ``tool_calls`` are those
    that an assistant makes, each with its function's ``name`` and ``arguments``; a message of the
    role ``tool`` is a result, of the call ``tool_call_id`` and the tool ``name`` where those are
    known.
    """

    role: str
    content: str
    learn: bool | None = None
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One row: ``messages``, or ``text`` alone where a model only goes on with it.

    ``row`` is its number in its source, from 0, and ``source`` the number of that source among
    those of the recipe. ``instruction`` and ``input`` are the two parts of the one question of a
    row that has them apart; the question is then no message yet, since templates join the parts
    in their own ways, and ``messages`` hold the answer alone, and a system message before it if
    there is one. ``tools`` are those that the conversation may use, as JSON schemas. ``turns``
    are the places of the messages that this row is for, where a conversation had to become
    several rows (see :meth:`Template.rows`); None where it did not.
    """

    row: int
    messages: tuple[Message, ...] = ()
    text: str | None = None
    instruction: str | None = None
    input: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    source: int = 0
    turns: tuple[int, ...] | None = None

    @classmethod
    def question_and_answer(
        cls, row: int, instruction: str, input: str, output: str, source: int = 0
    ) -> Example:
        """A row with an instruction, an input (may be empty) and an answer."""
        answer = Message("assistant", output)
        return cls(row, (answer,), instruction=instruction, input=input, source=source)

    @property
    def at(self) -> str:
        """Which row it is, as people count: ``row 6``, ``row 6 of source 2``."""
        return f"row {counted(self.row, self.source)}"

    @property
    def answer(self) -> str:
        """The last thing that the assistant says; of a text all of it."""
        if self.text is not None:
            return self.text
        said = [message.content for message in self.messages if message.role == "assistant"]
        return said[-1] if said else ""

    @property
    def asked(self) -> str:
        """All that stands before :attr:`answer`, as plain text: what was asked, and said so far."""
        parts = [part for part in (self.instruction, self.input) if part]
        if self.text is None:
            last = max((i for i, m in enumerate(self.messages) if m.role == "assistant"), default=0)
            parts += [message.content for message in self.messages[:last]]
        return "\n\n".join(parts)


def counted(row: int, source: int) -> str:
    """A row's number as people count, from 1: ``6``, or ``6 of source 2`` behind the first."""
    return f"{row + 1:,}" + (f" of source {source + 1}" if source else "")
