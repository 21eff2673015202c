"""What a conversation must be to be learned from, whatever format it came in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from halfbyte.data.example import Example, Message
from halfbyte.data.formats.cells import Unreadable, text_of
from halfbyte.data.formats.format import Origin
from halfbyte.data.formats.messages import read_messages
from halfbyte.data.formats.tool_calls import tools_of
from halfbyte.data.table import Cells

UNANSWERED = "what follows the assistant's last message is left out: nothing answers it."
NO_ANSWER = "the conversation holds no message of an assistant, so that nothing can be learned."
NOT_ASSISTANT = (
    "a message that is flagged to be learned is not the assistant's; its flag is passed over."
)


@dataclass(frozen=True)
class Conversations:
    """Rows of one conversation each, in ``messages``; ``name`` is ``messages`` or ``sharegpt``."""

    name: str
    messages: str
    tools: str | None
    system: str | None
    reason: dict[str, str]
    merge_turns: bool = False

    def by_role(self) -> dict[str, str]:
        roles = {"messages": self.messages, "tools": self.tools, "system": self.system}
        return {role: column for role, column in roles.items() if column is not None}

    def example(self, cells: Cells, row: int, origin: Origin) -> Example:
        messages = read_messages(cells.get(self.messages), self.messages, typed=origin.typed)
        if self.system is not None:
            messages = with_system(messages, text_of(cells.get(self.system), self.system))
        tools = tools_of(cells, self.tools, typed=origin.typed)
        checked = checked_messages(messages, origin, merge_turns=self.merge_turns)
        return Example(row, checked, tools=tools, source=origin.number)


def with_system(messages: list[Message], system: str) -> list[Message]:
    """The messages with a row's own system message before them, if it has one."""
    if not system.strip():
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content.strip() == system.strip():
            return messages
        raise Unreadable(
            "there is a system message in a column of its own and another one as the first "
            "message; leave one of the two out."
        )
    return [Message("system", system), *messages]


def checked_messages(
    messages: Sequence[Message], origin: Origin, *, merge_turns: bool
) -> tuple[Message, ...]:
    """The messages up to the assistant's last one; what was left out is told to ``origin``.

    Where one side speaks twice in a row, the two are joined if ``merge_turns``. Raises Unreadable
    if not.
    """
    kept: list[Message] = []
    for number, message in enumerate(messages, start=1):
        if message.learn is not None and message.role != "assistant":
            if message.learn:
                origin.told[NOT_ASSISTANT] += 1
            message = replace(message, learn=None)
        if kept and kept[-1].role == message.role != "tool":
            if not merge_turns:
                raise Unreadable(
                    f"messages {number - 1} and {number} are both the {message.role}'s; state "
                    "data.merge_turns: true to join such messages with a blank line, or correct "
                    "the row."
                )
            kept[-1] = _joined(kept[-1], message, number)
        else:
            kept.append(message)
    answered = len(kept)
    while answered and kept[answered - 1].role != "assistant":
        answered -= 1
    if kept and not answered:
        origin.told[NO_ANSWER] += 1
        return tuple(kept)
    if answered < len(kept):
        origin.told[UNANSWERED] += 1
        del kept[answered:]
    if any(message.role == "tool" for message in kept):
        return tuple(_tools_named(kept))
    return tuple(kept)


def _joined(first: Message, second: Message, number: int) -> Message:
    if first.learn != second.learn:
        raise Unreadable(
            f"messages {number - 1} and {number} are both the {second.role}'s and only one of "
            "them is to be learned, so that they cannot be joined; correct the row."
        )
    thoughts = [m.reasoning for m in (first, second) if m.reasoning]
    return replace(
        first,
        content="\n\n".join(m.content for m in (first, second) if m.content),
        reasoning="\n\n".join(thoughts) or None,
        tool_calls=first.tool_calls + second.tool_calls,
    )


def _tools_named(messages: Sequence[Message]) -> list[Message]:
    """Each tool's result with the tool's name, where the call that it answers is known."""
    names = {
        call["id"]: call["name"]
        for message in messages
        for call in message.tool_calls
        if "id" in call
    }
    return [
        replace(message, name=names[message.tool_call_id])
        if message.role == "tool" and message.name is None and message.tool_call_id in names
        else message
        for message in messages
    ]
