"""Where the assistant's messages stand in a rendered conversation, and which of them are learned.

A chat template is a program that nobody can read off where an answer begins. So the conversation
is rendered again as a model would be prompted with it, up to each answer, and again up to its end.
What lies between is that answer, its header left out and what ends the turn included; and a row is
only trained where every one of these renderings is how the whole one begins.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from halfbyte.data.batch import Segment
from halfbyte.data.example import Example, Message
from halfbyte.errors import DataError
from halfbyte.recipe.data_schema import LossOn

Conversation = Sequence[dict[str, Any]]
MARK = "\U000f1a7e"  # of the characters that mean nothing, so that no row holds it
# Why rows are left out, as Audited.rows_dropped says it.
REFUSED = "refused by the template"
UNLEARNED = "no answer that data.loss_on names"


class RowRefused(DataError):
    """A row that cannot be trained as its template writes it.

    ``row`` and ``source`` are the example's; ``reason`` is why, in words that name no row, and
    ``kind`` is REFUSED or UNLEARNED.
    """

    def __init__(self, example: Example, reason: str, kind: str = REFUSED) -> None:
        self.row = example.row
        self.source = example.source
        self.at = example.at
        self.reason = reason
        self.kind = kind
        super().__init__(f"{example.at}: {reason}.")


class PromptLost(Exception):
    """A conversation that is not written as it is prompted for."""

    def __init__(self, prompt: str, whole: str) -> None:
        at = 0
        while whole.startswith(prompt[: at + 1]):
            at += 1
        super().__init__(f"{prompt[at : at + 30]!r} becomes {whole[at : at + 30]!r}")


class Render(Protocol):
    """A chat template at work: the text of each of some conversations."""

    def __call__(self, conversations: Sequence[Conversation], *, generate: bool) -> list[str]: ...


@dataclass(frozen=True)
class Turn:
    """An assistant's message in the text of its conversation.

    ``spans`` are the characters, from and up to, that are learned: at first all from behind what
    is prompted to behind what ends the turn.
    """

    message: int
    spans: tuple[tuple[int, int], ...]


def learned_messages(example: Example, loss_on: LossOn) -> list[int]:
    """The messages of ``example`` that are learned, as places in ``example.messages``.

    Only what an assistant says can be; a message without text and tool calls says nothing, and to
    learn it would be to learn silence. ``answer`` is every one that the row does not itself
    exclude, ``assistant`` and ``all`` every one, ``last`` the last message of the assistant,
    ``flags`` those that the row says are to be learned.
    """
    spoken = [i for i, m in enumerate(example.messages) if m.role == "assistant" and says(m)]
    if example.turns is not None:
        return [i for i in spoken if i in example.turns]
    if loss_on == "last":
        return [i for i in spoken if i == last_assistant(example)]
    if loss_on == "flags":
        return [i for i in spoken if example.messages[i].learn]
    if loss_on == "answer":
        return [i for i in spoken if example.messages[i].learn is not False]
    return spoken


def nothing_learned(example: Example, loss_on: LossOn) -> RowRefused:
    """The error for an example of which ``learned_messages`` has none."""
    why = {
        "last": "its last answer is empty, and data.loss_on: last learns no other",
        "flags": "none of its answers is flagged, and data.loss_on: flags learns no other",
        "answer": "each of its answers is empty, or flagged as not to be learned",
    }
    return RowRefused(example, why.get(loss_on, "it holds no answer"), UNLEARNED)


def says(message: Message) -> bool:
    """Whether there is anything in a message to learn; thoughts alone are no answer."""
    return bool(message.content.strip() or message.tool_calls)


def last_assistant(example: Example) -> int | None:
    """The place of the last message of the assistant."""
    places = [i for i, message in enumerate(example.messages) if message.role == "assistant"]
    return places[-1] if places else None


def trace(
    render: Render, messages: Conversation, wanted: Sequence[int], closing: str
) -> list[tuple[str, list[Turn]]]:
    """The texts in which each of the ``wanted`` messages, which ascend, stands once as it is when
    it is prompted for and given.

    That is one text, up to the last of them, wherever all stand in it; else one more up to the
    last that is missing, and so on. The shortest text comes first. ``closing`` is what the
    template writes behind the last message of every conversation. Raises PromptLost where no text
    begins with a prompt.
    """
    prompts = render([messages[:i] for i in wanted], generate=True)
    given = render([messages[: i + 1] for i in wanted], generate=False)
    left = list(range(len(wanted)))
    found: list[tuple[str, list[Turn]]] = []
    while left:
        last = left.pop()
        prompt, text = prompts[last], given[last]
        if not text.startswith(prompt):
            text = prompt + _answer(render, messages[: wanted[last] + 1], prompt, text)
        turns: list[Turn] = []
        for which in list(left):
            so_far = given[which]
            if closing and not text.startswith(so_far):
                so_far = so_far.removesuffix(closing)
            begin, end = len(prompts[which]), len(so_far)
            if begin < end and text.startswith(so_far) and text.startswith(prompts[which]):
                turns.append(Turn(wanted[which], ((begin, end),)))
                left.remove(which)
        turns.append(Turn(wanted[last], ((len(prompt), len(text)),)))
        found.append((text, turns))
    return found[::-1]


def _answer(render: Render, messages: Conversation, prompt: str, text: str) -> str:
    """What ``text`` writes for the last message, where it does not begin with its ``prompt``.

    Mistral's templates write the system message only before an answer, and leave it out behind
    one. There the message before still stands in front of the answer, with what is written
    between them, and what follows is what the model is to say.
    """
    *before, asked = messages[:-1]
    marked: dict[str, Any] = {**asked, "content": MARK}
    head, found, tail = render([[*before, marked]], generate=True)[0].partition(MARK)
    if found and prompt.startswith(head) and prompt.endswith(tail):
        end = text.rfind(prompt[len(head) :])
        if end >= 0:
            return text[end + len(prompt) - len(head) :]
    raise PromptLost(prompt, text)


def segments_of(text: str, spans: Sequence[tuple[int, int]], everything: bool) -> list[Segment]:
    """``text`` cut at ``spans``, which are learned, as is the rest where ``everything`` is."""
    found: list[Segment] = []
    at = 0
    for start, end in spans:
        if start > at:
            found.append(Segment(text[at:start], everything))
        found.append(Segment(text[start:end], True))
        at = end
    if at < len(text):
        found.append(Segment(text[at:], everything))
    return found


def holds(text: str, said: str) -> bool:
    """Whether ``said`` stands in ``text``: as it is, as JSON writes it, or with other spaces."""
    said = said.strip()
    if said in text:
        return True
    bare = _bare(text)
    return _bare(said) in bare or _bare(json.dumps(said, ensure_ascii=False)[1:-1]) in bare


def _bare(text: str) -> str:
    return "".join(text.split())
