"""The parts of a row that filters look at, and what is shown of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from halfbyte.data.audit.private import hidden
from halfbyte.data.example import Example, Message
from halfbyte.recipe.cleaning import Part

# What a filter says of a row: None leaves it as it is; a text drops it and says why; an Example
# is put in its place, with what was changed.
Verdict = None | str | tuple[Example, str]

SHOWN = 60  # characters of a text that show why


def part(example: Example, by: Part) -> str:
    """The question, the last answer, or both; the question of a plain text is empty."""
    if by == "answer":
        return example.answer
    asked = example.asked
    return asked if by == "question" else f"{asked}\n\n{example.answer}"


def framed_part(example: Example, by: Part) -> tuple[str, str]:
    """What frames a row, and the part of it apart from that.

    The frame is the system message, and the instruction where an input follows it: the same in
    many rows, it would make all of them alike. An answer stands for itself.
    """
    if by == "answer":
        return "", example.answer
    places = [i for i, message in enumerate(example.messages) if message.role == "assistant"]
    before = example.messages[: places[-1] if places else 0]
    frame = [message.content for message in before if message.role == "system"]
    texts = [message.content for message in before if message.role != "system"]
    if example.input:
        frame.append(example.instruction or "")
        texts.insert(0, example.input)
    elif example.instruction:
        texts.insert(0, example.instruction)
    if by == "row":
        texts.append(example.answer)
    return "\n\n".join(frame), "\n\n".join(texts)


def shown_part(example: Example, by: Part) -> str:
    """The beginning of what tells the row from others: of a question not what all rows ask."""
    return beginning(example.answer if by == "answer" else example.input or part(example, by))


def messages_of(example: Example, field: Part) -> Iterator[str]:
    """The texts of a row one by one: what the assistant says, all else, or both."""
    if field != "answer":
        yield from (text for text in (example.instruction, example.input) if text)
    for message in example.messages:
        if field == "row" or (field == "answer") == (message.role == "assistant"):
            yield from _texts(message)
    if example.text is not None and field != "question":
        yield example.text


def _texts(message: Message) -> Iterator[str]:
    if message.reasoning:
        yield message.reasoning
    if message.content:
        yield message.content


def changed(example: Example, field: Part, mend: Callable[[str], str]) -> Example:
    """``example`` with each of the texts that ``messages_of`` gives as ``mend`` makes it."""

    def mended(text: str | None, *, seen: bool) -> str | None:
        return mend(text) if text and seen else text

    messages = tuple(
        _mended(message, mend)
        if field == "row" or (field == "answer") == (message.role == "assistant")
        else message
        for message in example.messages
    )
    return replace(
        example,
        messages=messages,
        instruction=mended(example.instruction, seen=field != "answer"),
        input=mended(example.input, seen=field != "answer"),
        text=mended(example.text, seen=field != "question"),
    )


def _mended(message: Message, mend: Callable[[str], str]) -> Message:
    content = mend(message.content) if message.content else message.content
    reasoning = mend(message.reasoning) if message.reasoning else message.reasoning
    return replace(message, content=content, reasoning=reasoning)


def calls_a_tool(example: Example) -> bool:
    """Whether the last answer has no text because it is a call."""
    said = [message for message in example.messages if message.role == "assistant"]
    return bool(said) and bool(said[-1].tool_calls) and not said[-1].content.strip()


def beginning(text: str) -> str:
    """The first characters of ``text`` in one line, likely private data hidden."""
    shown = _line(hidden(text[: 4 * SHOWN]))
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"


def ending(text: str) -> str:
    """The last characters of ``text``, likewise."""
    shown = _line(hidden(text[-4 * SHOWN :]))
    cut = len(text) > 4 * SHOWN or len(shown) > SHOWN
    return "…" + shown[-(SHOWN - 1) :] if cut else shown


def around(text: str, start: int, end: int) -> str:
    """``text[start:end]`` in square brackets, with a little of what stands around it, likewise."""
    begin = max(0, start - 4 * SHOWN)
    # Of the same length: what is hidden leaves all places as they are.
    text, more = hidden(text[begin : end + 4 * SHOWN]), end + 4 * SHOWN < len(text)
    start, end = start - begin, end - begin
    room = max(8, (SHOWN - min(end - start, SHOWN)) // 2)
    found = text[start:end] if end - start <= SHOWN else text[start : start + SHOWN - 1] + "…"
    shown = _line(f"{text[max(0, start - room) : start]}[{found}]{text[end : end + room]}")
    left = "…" if begin or start > room else ""
    return left + shown + ("…" if more or end + room < len(text) else "")


def _line(text: str) -> str:
    return " ".join(text.split())
