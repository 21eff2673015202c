"""What a chat template writes around messages, found by asking it.

Most templates are five fixed texts between the messages. Where a template is, they can be written
in another language of templates; where it is not, that is found out too, since the texts are
tried on further conversations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Messages = Sequence[dict[str, str]]
Around = tuple[str, str]
# What ``ChatRender`` makes of one conversation, up to where an answer begins. Raises ValueError.
Render = Callable[[Messages], str]

_RULE, _ASKED, _SAID, _MORE = "qrule", "qasked", "qsaid", "qmore"


@dataclass(frozen=True)
class TurnFormat:
    """The texts between the messages of a conversation.

    ``first`` stands before the first question and ``again`` between an answer and the next one;
    ``answer`` between a question and its answer, ``generate`` behind the last. A system message
    stands ``where`` before a question (the first, each or the last), between the two texts of
    ``first_system`` or ``again_system``, which take the place of ``first`` and ``again``. ``where``
    None: the template has no place for it.
    """

    first: str
    again: str
    answer: str
    generate: str
    where: Literal["first", "each", "last"] | None
    first_system: Around
    again_system: Around

    def render(self, messages: Messages) -> str:
        """The conversation, whose last message is a question."""
        system = next((m["content"] for m in messages if m["role"] == "system"), "")
        turns = [m for m in messages if m["role"] != "system"]
        text = ""
        for number, message in enumerate(turns):
            last = number == len(turns) - 1
            if message["role"] != "user":
                text += message["content"]
                continue
            before = self.first if number == 0 else self.again
            around = self.first_system if number == 0 else self.again_system
            here = {"first": number == 0, "each": True, "last": last, None: False}[self.where]
            text += system.join(around) if system and here else before
            text += message["content"] + (self.generate if last else self.answer)
        return text


def find_turn_format(render: Render) -> TurnFormat | None:
    """The texts that ``render`` writes; None where it is not made of such."""
    try:
        found = _asked(render)
        if found is None:
            return None
        for messages in trial_conversations(system=found.where is not None):
            if found.render(messages) != render(messages):
                return None
    except ValueError:
        return None
    return found


def trial_conversations(*, system: bool) -> list[Messages]:
    """Conversations that end with a question, as people have them; some with a system message."""
    question = "What is 12 × 3?\n\nSay it, \"in words\" and {{ in }} 'figures' <b>."
    answer = "It is 36.\n- thirty-six\n\tand so on…"
    more = "Merci ! Et naïve café 東京?"
    talks: list[list[dict[str, str]]] = [
        [_message("user", question)],
        [_message("user", more), _message("assistant", answer), _message("user", question)],
        [
            *(_message("user", "Hi"), _message("assistant", "Hello.")),
            *(_message("user", more), _message("assistant", answer)),
            _message("user", question),
        ],
    ]
    rule = _message("system", "Be brief.\nAnswer in English, or not at all.")
    return [*talks, *([rule, *talk] for talk in talks if system)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _asked(render: Render) -> TurnFormat | None:
    asked, said, more = (
        _message("user", _ASKED),
        _message("assistant", _SAID),
        _message("user", _MORE),
    )
    rule = _message("system", _RULE)
    parts = _cut(render([asked, said, more]), (_ASKED, _SAID, _MORE))
    if parts is None:
        return None
    first, answer, again, generate = parts
    nowhere = TurnFormat(first, again, answer, generate, None, ("", ""), ("", ""))
    try:
        alone, talk = render([rule, asked]), render([rule, asked, said, more])
    except ValueError:
        return nowhere
    opening = _cut(alone, (_RULE, _ASKED))
    if opening is None:
        return nowhere if _RULE not in alone else None
    first_system = opening[0], opening[1]
    before, found, behind = talk.partition(_SAID)
    if not found:
        return None
    in_first, in_more = before.count(_RULE), behind.count(_RULE)
    if (in_first, in_more) == (1, 0):
        return TurnFormat(first, again, answer, generate, "first", first_system, ("", ""))
    later = _cut(behind, (_RULE, _MORE))
    if later is None or in_more != 1:
        return None
    where: Literal["each", "last"] = "each" if in_first else "last"
    return TurnFormat(first, again, answer, generate, where, first_system, (later[0], later[1]))


def _cut(text: str, words: Sequence[str]) -> list[str] | None:
    """What stands around ``words``, each of which is there once and in this order."""
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            return None
        parts.append(before)
    return [*parts, text]
