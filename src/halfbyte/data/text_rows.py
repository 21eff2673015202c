"""Rows that are a text, which a model learns to go on with: continued pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.data.batch import Segment
from halfbyte.data.example import Example
from halfbyte.data.tokenize import leading_text
from halfbyte.data.turns import UNLEARNED, RowRefused
from halfbyte.recipe.data_schema import LossOn

LONGEST_OPENING = 400  # characters

# What a chat with such a model is: its texts one after another.
JOINED = "{%- for message in messages -%}{{- message['content'] -}}{%- endfor -%}"


def text_segments(example: Example, eos: str) -> list[Segment]:
    """A row's text and the end of sequence, all learned; one that it brings along is not doubled.

    Raises RowRefused where there is nothing, or a conversation.
    """
    text = _text(example)
    if not text.strip():
        raise RowRefused(example, "it holds no text", UNLEARNED)
    end = "" if eos and text.endswith(eos) else eos
    return [Segment(text, True), Segment(end, True)]


def opening(text: str) -> tuple[str, str]:
    """A text's beginning, for a model to go on from, and the rest.

    It is half of the text or LONGEST_OPENING, back to the end of a word.
    """
    at = min(len(text) // 2, LONGEST_OPENING)
    words = text[:at].rstrip().rpartition(" ")[0].rstrip()
    at = len(words) or max(1, at)
    return text[:at], text[at:]


class TextRows:
    """No format at all: the text and its end, for data without questions."""

    name = "text"
    reads: frozenset[str] = frozenset()
    warnings: Sequence[str] = ()

    def __init__(self, tokenizer: Any = None, own_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._eos = (tokenizer.eos_token if tokenizer is not None else None) or ""
        self._own = own_template

    def question(self, example: Example) -> str:
        return self.prompt(example)

    def prompt(self, example: Example) -> str:
        return opening(_text(example))[0]

    def rows(self, example: Example, loss_on: LossOn) -> list[tuple[Example, list[Segment]]]:
        return [(example, self.segments(example, loss_on))]

    def segments(self, example: Example, loss_on: LossOn) -> list[Segment]:
        return text_segments(example, self._eos)

    def chat_template(self) -> str:
        """The model's own, which texts do not change; where it has none, its messages joined."""
        if self._own is not None:
            return self._own
        lead = leading_text(self._tokenizer, "a")
        return (f"{{{{- {lead} -}}}}" if lead else "") + JOINED


def _text(example: Example) -> str:
    if example.text is None:
        raise RowRefused(
            example,
            "the template text takes texts, and this row is a conversation; state another "
            "data.template (chat, alpaca, plain or a text of your own)",
        )
    return example.text
