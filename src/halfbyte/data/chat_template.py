"""Rows in the model's own chat template."""

from __future__ import annotations

import json
import re
from datetime import date
from typing import Any

from halfbyte.data.batch import Segment
from halfbyte.data.example import Example
from halfbyte.data.tokenize import leading_text
from halfbyte.errors import DataError
from halfbyte.recipe.schema import LossOn

# What Llama 3's own template falls back to.
PINNED = date(2024, 7, 26)
DATED = (
    f"the model's chat template writes the current date into each prompt; here and in the "
    f"adapter's folder it is always {PINNED.day} {PINNED:%B %Y}, so that what is prompted is what "
    "was trained."
)
ELSE = "state another data.template (alpaca, plain or a text of your own)"


def own_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template; of several, the one named ``default``."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def pin_dates(template: str) -> tuple[str, bool]:
    """``template`` with PINNED in place of the current date, and whether it wrote one.

    Some templates (Llama 3.1 and 3.2) put the day into each prompt: the same rows would give
    other tokens tomorrow, and a run could not be resumed.
    """

    def pinned(found: re.Match[str]) -> str:
        return json.dumps(PINNED.strftime(found[2]))

    pattern = re.compile(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)")
    return pattern.sub(pinned, template), pattern.search(template) is not None


class ModelChat:
    """One user message and its answer, as the model's own template writes them.

    The user's message is the instruction, a blank line and the input; either stands alone where
    the other is empty.
    """

    name = "chat"

    def __init__(
        self, tokenizer: Any, *, system: str | None = None, instruction: str | None = None
    ) -> None:
        own = None if tokenizer is None else own_template(tokenizer)
        if own is None:
            raise DataError(f"data.template: chat, but the model has no chat template; {ELSE}.")
        self._own, dated = pin_dates(own)
        self.warnings = [DATED] if dated else []
        self._tokenizer = tokenizer
        self._system = system
        self._instruction = instruction

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(["instruction", "input"] if self._instruction is None else ["input"])

    def question(self, example: Example) -> str:
        instruction = example.instruction if self._instruction is None else self._instruction
        return "\n\n".join(part for part in (instruction, example.input) if part)

    def prompt(self, example: Example) -> str:
        return self._render(self._messages(example), generate=True)

    def segments(self, example: Example, loss_on: LossOn) -> list[Segment]:
        messages = self._messages(example)
        prompt = self._render(messages, generate=True)
        answered = [*messages, {"role": "assistant", "content": example.answer}]
        whole = self._render(answered, generate=False)
        if not whole.startswith(prompt):
            at = 0
            while whole.startswith(prompt[: at + 1]):
                at += 1
            raise DataError(
                "the model's chat template writes a prompt otherwise once its answer follows "
                f"({prompt[at : at + 30]!r} becomes {whole[at : at + 30]!r}), so that what was "
                f"trained would not be what is prompted; {ELSE}."
            )
        return [Segment(prompt, loss_on == "all"), Segment(whole[len(prompt) :], True)]

    def chat_template(self) -> str:
        """The model's own, with the recipe's system message as its default.

        Where the tokenizer begins a text with a token that the template does not write, it is put
        in front, as it was in training.
        """
        parts = []
        if self._system is not None:
            system = json.dumps({"role": "system", "content": self._system}, ensure_ascii=False)
            parts.append(
                "{%- if not messages or messages[0]['role'] != 'system' -%}"
                f"{{%- set messages = [{system}] + messages -%}}"
                "{%- endif -%}"
            )
        sample = self._render([{"role": "user", "content": "a"}], generate=True)
        lead = leading_text(self._tokenizer, sample)
        if parts or lead:
            # Ends as an expression, after which, unlike after a block, white space is kept.
            parts.append(f"{{{{- {lead or repr('')} }}}}")
        return "".join([*parts, self._own])

    def _messages(self, example: Example) -> list[dict[str, str]]:
        user = {"role": "user", "content": self.question(example)}
        if self._system is None:
            return [user]
        return [{"role": "system", "content": self._system}, user]

    def _render(self, messages: list[dict[str, str]], *, generate: bool) -> str:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._own,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"the model's chat template does not take a row ({str(error).rstrip('.')}); {ELSE}."
            ) from error
