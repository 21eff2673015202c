"""Prompts and completions, texts or conversations, and preference sets, whose better one counts.

These are TRL's shapes: ``prompt`` and ``completion``, ``prompt``, ``chosen`` and ``rejected``, or
the latter two alone, each with the whole conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import takewhile

from halfbyte.data.example import Example, Message
from halfbyte.data.formats.cells import from_json, text_of
from halfbyte.data.formats.conversation import checked_messages, with_system
from halfbyte.data.formats.format import Origin
from halfbyte.data.formats.history import after, read_history
from halfbyte.data.formats.messages import read_messages, with_learn
from halfbyte.data.formats.tool_calls import tools_of
from halfbyte.data.table import Cells

BAD = "label is false: the answer is a bad one, and the row is left out."


@dataclass(frozen=True)
class PromptCompletions:
    """Rows of a prompt and what follows it; ``completion`` may be named ``chosen``.

    With ``as_input`` all rows share an instruction, and a prompt is their input. ``rejected`` is
    looked at only to find where two whole conversations part, and ``label`` tells good from bad.
    ``history`` is of rows of texts, and no part of the completion.
    """

    prompt: str | None
    completion: str
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    rejected: str | None = None
    label: str | None = None
    as_input: bool = False
    merge_turns: bool = False
    reason: dict[str, str] = field(default_factory=dict)
    name: str = "prompt_completion"

    def by_role(self) -> dict[str, str]:
        asked = "input" if self.as_input else "instruction"
        roles = {
            asked: self.prompt,
            "output": self.completion,
            "system": self.system,
            "history": self.history,
            "tools": self.tools,
        }
        return {role: column for role, column in roles.items() if column is not None}

    def example(self, cells: Cells, row: int, origin: Origin) -> Example | None:
        if self.label is not None and cells.get(self.label) is False:
            origin.told[BAD] += 1
            return None
        asked = None if self.prompt is None else from_json(cells.get(self.prompt))
        said = from_json(cells.get(self.completion))
        system = "" if self.system is None else text_of(cells.get(self.system), self.system)
        if not isinstance(asked, list) and not isinstance(said, (list, dict)):
            return self._texts(cells, system, row, origin)
        messages = with_system(self._messages(cells, asked, said, origin.typed), system)
        checked = checked_messages(messages, origin, merge_turns=self.merge_turns)
        tools = tools_of(cells, self.tools, typed=origin.typed)
        return Example(row, checked, tools=tools, source=origin.number)

    def _texts(self, cells: Cells, system: str, row: int, origin: Origin) -> Example:
        prompt = "" if self.prompt is None else text_of(cells.get(self.prompt), self.prompt)
        answer = Message("assistant", text_of(cells.get(self.completion), self.completion))
        example = Example(
            row,
            (Message("system", system), answer) if system else (answer,),
            instruction="" if self.as_input else prompt,
            input=prompt if self.as_input else "",
            source=origin.number,
        )
        if self.history is None:
            return example
        earlier = read_history(cells.get(self.history), self.history, typed=origin.typed)
        if not earlier:
            return example
        whole = after(with_learn(earlier, False), example)
        *before, last = checked_messages(whole.messages, origin, merge_turns=self.merge_turns)
        return replace(whole, messages=(*before, replace(last, learn=True)))

    def _messages(self, cells: Cells, asked: object, said: object, typed: bool) -> list[Message]:
        """What leads to the completion, of which nothing is learned, and the completion."""
        if isinstance(said, dict):
            said = [said]
        if isinstance(said, list):
            following = read_messages(said, self.completion, typed=typed)
        else:
            following = [Message("assistant", text_of(said, self.completion))]
        if isinstance(asked, list):
            before = read_messages(asked, str(self.prompt), typed=typed)
        elif self.prompt is not None and not any(m.role == "user" for m in following):
            before = [Message("user", text_of(asked, self.prompt))]
        else:
            before = self._shared(cells, following, typed)
        if following[: len(before)] == before:  # the completion repeats its prompt
            following = following[len(before) :]
        return [*with_learn(before, False), *with_learn(following, True)]

    def _shared(self, cells: Cells, chosen: list[Message], typed: bool) -> list[Message]:
        """The messages in which the two conversations of a preference are equal.

        The last one of the shorter is never among them: there is something to prefer.
        """
        if self.rejected is None:
            return []
        rejected = read_messages(cells.get(self.rejected), self.rejected, typed=typed)
        pairs = zip(chosen, rejected, range(len(rejected) - 1), strict=False)
        common = takewhile(lambda pair: pair[0] == pair[1], list(pairs)[: len(chosen) - 1])
        return [message for message, *_ in common]
