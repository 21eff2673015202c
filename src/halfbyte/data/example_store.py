"""Examples by their place: in memory while they are few, else in a file."""

from __future__ import annotations

import marshal
import pickle
from typing import Any

from halfbyte.data.example import Example, Message
from halfbyte.data.spool import Spool

# Of marshal's forms the last in which equal values are equal bytes: later ones point back at
# texts that are the same object. Only this process reads what it writes.
FORM = 2


class ExampleStore(Spool[Example]):
    """Examples in the order in which they are added; a million of them take 8 MB of memory."""

    @staticmethod
    def encode(example: Example) -> bytes:
        """By marshal, which is fast; by pickle where there are tools, whose values may be anything.

        Equal examples without tools are equal bytes.
        """
        fields: Any = (
            example.row,
            example.source,
            example.text,
            example.instruction,
            example.input,
            example.turns,
            tuple([_fields(message) for message in example.messages]),
            example.tools,
        )
        if example.tools or any(message.tool_calls for message in example.messages):
            return pickle.dumps(fields, protocol=5)
        return marshal.dumps(fields, FORM)

    @staticmethod
    def decode(stored: bytes) -> Example:
        # A pickle begins with this byte.
        load = pickle.loads if stored[:1] == b"\x80" else marshal.loads
        row, source, text, instruction, input, turns, messages, tools = load(stored)
        said = tuple([Message(*message) for message in messages])
        return Example(row, said, text, instruction, input, tools, source, turns)


def _fields(message: Message) -> tuple[Any, ...]:
    """The fields of a message in their order; of a plain one those that say something."""
    plain = (message.role, message.content)
    more = (
        message.learn,
        message.reasoning,
        message.tool_calls,
        message.tool_call_id,
        message.name,
    )
    return plain if more == _NOTHING_MORE else (*plain, *more)


_NOTHING_MORE = (None, None, (), None, None)
