"""What was asked and answered before a row's question, in a column of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from halfbyte.data.example import Example, Message
from halfbyte.data.formats.cells import Unreadable, from_json, is_missing, kind_of, text_of
from halfbyte.data.formats.conversation import with_system
from halfbyte.data.formats.messages import read_messages


def read_history(cell: object, column: str, *, typed: bool) -> list[Message]:
    """The messages of a cell: a list of [question, answer], of messages, or the JSON of either.

    Raises Unreadable, which counts pairs from 1.
    """
    found = from_json(cell)
    if is_missing(found):
        return []
    if not isinstance(found, (list, tuple)):
        raise Unreadable(
            f"column {column}: {kind_of(cell)} that is no list of earlier questions and answers."
        )
    if isinstance(found[0], Mapping):
        return read_messages(found, column, typed=typed)
    return [
        message for number, pair in enumerate(found, 1) for message in _pair(pair, number, column)
    ]


def _pair(pair: object, number: int, column: str) -> tuple[Message, Message]:
    if not isinstance(pair, (list, tuple)):
        raise Unreadable(
            f"column {column}: pair {number} is {kind_of(pair)} and no list of a question and its "
            "answer."
        )
    if len(pair) != 2:
        raise Unreadable(
            f"column {column}: pair {number} has {len(pair)} "
            f"{'entry' if len(pair) == 1 else 'entries'} where there are two, a question and its "
            "answer."
        )
    for name, said in zip(("question", "answer"), pair, strict=True):
        if said is None:
            raise Unreadable(f"column {column}: pair {number} has no {name}.")
    asked, answered = (text_of(said, f"{column}, pair {number}") for said in pair)
    return Message("user", asked), Message("assistant", answered)


def after(earlier: list[Message], example: Example) -> Example:
    """The question and answer of ``example`` as the end of the conversation that began so.

    Its question is then a message like those before it: the instruction, a blank line and the
    input, in every template.
    """
    question = "\n\n".join(part for part in (example.instruction, example.input) if part)
    *system, answer = example.messages
    messages = [*earlier, Message("user", question), answer]
    if system:
        messages = with_system(messages, system[0].content)
    return replace(example, messages=tuple(messages), instruction=None, input=None)
