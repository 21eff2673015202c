"""A chat's settings, the conversation that it begins with, and one answer of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.errors import ModelError
from halfbyte.finished.found import require_template
from halfbyte.generate.answer import Answer, answer, room_for_prompt
from halfbyte.generate.conversation import Conversation
from halfbyte.generate.prompt import prompt_ids
from halfbyte.model.source import context_length

if TYPE_CHECKING:
    from halfbyte.finished.opened import OpenedAdapter


@dataclass(frozen=True)
class ChatSettings:
    """How answers are made."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0

    @property
    def words(self) -> str:
        """``greedy``, or the temperature."""
        return "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"


def make_conversation(
    opened: OpenedAdapter, settings: ChatSettings, system: str | None
) -> Conversation:
    """An empty conversation in the format of the run.

    Only a model's own chat template takes several turns; in an instruction format each row was
    one question, so each message is. Raises ModelError for a system message that the format has
    no place for.
    """
    tokenizer = opened.tokenizer
    require_template(opened.found, tokenizer)
    conversation = Conversation(
        tokenizer,
        room=room_for_prompt(context_length(opened.model.config), settings.max_new_tokens),
        count=lambda prompt: len(prompt_ids(tokenizer, prompt)),
        system=system,
        single_turn=opened.single_turn,
    )
    if system is not None and not conversation.takes_system():
        raise ModelError(
            "the format that was trained has no place for a system message; leave out --system."
        )
    return conversation


def answer_message(
    opened: OpenedAdapter, prompt: str, settings: ChatSettings, on_text: Callable[[str], None]
) -> Answer:
    """The answer to one rendered prompt; ``on_text`` hears it as it comes."""
    (given,) = answer(
        opened.model,
        opened.tokenizer,
        [prompt],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        repetition_penalty=settings.repetition_penalty,
        seed=settings.seed,
        on_text=lambda _, piece: on_text(piece),
    )
    return given


def cut_text(tokens: int) -> str:
    """What is said where a message is longer than the model takes."""
    return f"the message is too long for the model: its first {tokens:,} tokens were left out"
