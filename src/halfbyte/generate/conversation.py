"""A conversation in the format that an adapter was trained in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from halfbyte.data.chat_render import ChatRender, TemplateFailed
from halfbyte.data.chat_template import own_template
from halfbyte.errors import ModelError

_PROBE = "halfbyte probe"


@dataclass(frozen=True)
class Turn:
    """A message and its answer; ``by`` says who answered, in the words of whoever keeps it."""

    said: str
    answered: str
    by: str = ""


@dataclass(frozen=True)
class Rendered:
    """A prompt that fits, and what had to go for it."""

    prompt: str
    dropped: int  # oldest turns (a message and its answer) that were left out, now and for good


class Conversation:
    """Messages and answers, rendered by the tokenizer's chat template (``data/chat_render.py``).

    With ``single_turn`` (a format whose rows were one question each) every message stands alone.
    All turns are remembered, also those that are in no prompt any more.
    ``room`` is how many tokens a prompt may have; ``count`` tells the tokens of one.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        room: int,
        count: Callable[[str], int],
        system: str | None = None,
        single_turn: bool = False,
    ) -> None:
        self._chat = ChatRender(own_template(tokenizer) or "", tokenizer)
        self._room = room
        self._count = count
        self.system = system
        self.single_turn = single_turn
        self._turns: list[Turn] = []
        self._dropped = 0  # of them, from the first on

    @property
    def turns(self) -> int:
        """Messages that have an answer and are part of the next prompt."""
        return 0 if self.single_turn else len(self._turns) - self._dropped

    @property
    def said(self) -> list[Turn]:
        """All turns since the conversation began."""
        return list(self._turns)

    def prompt(self, message: str) -> Rendered:
        """The prompt for ``message``; where it is too long the oldest turns are forgotten.

        Raises ModelError where the template does not take the conversation, or writes nothing.
        """
        dropped = 0
        while True:
            prompt = self._render(message)
            tokens = self._count(prompt)
            if not tokens:
                raise ModelError(
                    "the adapter's chat_template.jinja writes nothing of this conversation; mend "
                    "the template."
                )
            if not self.turns or tokens <= self._room:
                return Rendered(prompt, dropped)
            self._dropped += 1
            dropped += 1

    def add(self, message: str, answer: str, by: str = "") -> None:
        """Remember a turn."""
        self._turns.append(Turn(message, answer, by))

    def take_last(self) -> Turn | None:
        """Forget the last turn, which is returned; None where there is none."""
        if not self._turns:
            return None
        self._dropped = min(self._dropped, len(self._turns) - 1)
        return self._turns.pop()

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self._turns.clear()
        self._dropped = 0

    def takes_system(self) -> bool:
        """Whether the format has a place for a system message."""
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "?"}]
        try:
            return _PROBE in self._apply(messages)
        except ModelError:
            return False

    def _render(self, message: str) -> str:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in [] if self.single_turn else self._turns[self._dropped :]:
            messages.append({"role": "user", "content": turn.said})
            messages.append({"role": "assistant", "content": turn.answered})
        return self._apply([*messages, {"role": "user", "content": message}])

    def _apply(self, messages: list[dict[str, str]]) -> str:
        try:
            return self._chat([messages], generate=True)[0]
        except TemplateFailed as error:
            raise ModelError(
                f"the adapter's chat_template.jinja does not take this conversation ({error}); "
                "mend the template, or begin a new conversation."
            ) from error
