"""How a row becomes text: the choice among the formats.

Every template makes of an example first the question, that is what a user would have typed, and
then the prompt, which is the question in its frame. So a chat template that puts a user's message
into the same frame renders the format that was trained, by construction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from halfbyte.data.batch import Segment
from halfbyte.data.chat_template import ModelChat, own_template
from halfbyte.data.example import Example
from halfbyte.data.text_rows import TextRows, opening
from halfbyte.data.text_template import ALPACA, PLAIN, TextTemplate, parse_format
from halfbyte.data.turns import RowRefused, last_assistant
from halfbyte.errors import DataError
from halfbyte.events.types import Choice
from halfbyte.recipe.data_schema import DataRecipe, LossOn

TEXTS = "the rows are texts without questions, which are learned as they stand"


class Template(Protocol):
    """A format of rows.

    What takes an example raises RowRefused where the format has no place for it, or cannot be
    shown to write it as a model would be prompted.
    """

    @property
    def name(self) -> str:
        """``chat``, ``alpaca``, ``plain``, ``text`` or ``custom``."""
        ...

    @property
    def reads(self) -> frozenset[str]:
        """What of a row its text depends on, but for the messages themselves.

        Those of ``instruction``, ``input``, ``system``, ``tools`` and ``reasoning`` that have a
        place; what a row has of the others is left out.
        """
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """What about the format the user may not expect."""
        ...

    def question(self, example: Example) -> str:
        """What a user would have typed: as the one user message, it renders ``prompt``.

        Of a conversation, which no one message renders, all that was said before its last answer.
        """
        ...

    def prompt(self, example: Example) -> str:
        """The text up to where the last answer begins; of a text its beginning.

        It holds the beginning-of-sequence token only where the model's own chat template writes
        it: tokenize it with the special tokens that the tokenizer adds, and that one not twice.
        """
        ...

    def rows(self, example: Example, loss_on: LossOn) -> list[tuple[Example, list[Segment]]]:
        """What is trained of ``example``: most often itself, and its segments.

        A chat template may write an earlier answer otherwise than it was given (Qwen 3 leaves out
        its thoughts) or than it was prompted for (Mistral moves the system message on). Such a
        conversation becomes several rows with the same number, each up to one of its answers and
        with that learned, so that every answer is learned once, in the text that the model sees
        when it gives it.
        """
        ...

    def segments(self, example: Example, loss_on: LossOn) -> list[Segment]:
        """The one row that ``rows`` makes of ``example``, up to the end of its last answer.

        Learned are the answers that ``loss_on`` names, each with what ends it and without its
        header, and of a text everything; see :func:`halfbyte.data.turns.learned_messages`.
        """
        ...

    def chat_template(self) -> str:
        """A Jinja chat template that renders this format, for the adapter's folder.

        Its text is complete, beginning-of-sequence token included, as programs that render chat
        templates expect.
        """
        ...


def make_template(
    data: DataRecipe, tokenizer: Any = None, *, texts: bool = False
) -> tuple[Template, list[Choice]]:
    """The template that ``data`` asks for, and what was chosen for the user.

    ``texts``: all rows are texts without questions, which need no template; where only some are,
    every template takes them as they are. Without a tokenizer (a look at a file before a model is
    named) ``auto`` is ``alpaca``, and special tokens are left out. Raises DataError for a template
    that is none, or one that has no place for what the recipe states.
    """
    asked = data.template.strip()
    choices: list[Choice] = []
    name = asked
    if asked == "auto":
        name, reason = ("text", TEXTS) if texts else _automatic(tokenizer)
        choices.append(Choice("data.template", "auto", name, reason))
    if name == "text":
        return TextRows(tokenizer, own_template(tokenizer) if tokenizer else None), choices
    if name == "chat":
        return ModelChat(tokenizer, system=data.system, instruction=data.instruction), choices
    if data.system is not None:
        raise DataError(
            f"data.system is for the template chat, and the template here is "
            f"{name if name in ('alpaca', 'plain') else 'a text of your own'}; write the system "
            "message into data.template or leave it out."
        )
    if name in ("alpaca", "plain"):
        format = ALPACA if name == "alpaca" else PLAIN
    else:
        format = parse_format(data.template)
    return TextTemplate(format, tokenizer, instruction=data.instruction), choices


def rows_of_each(
    template: Template, examples: Iterable[Example], loss_on: LossOn
) -> Iterator[list[tuple[Example, list[Segment]]] | RowRefused]:
    """What ``template.rows`` makes of each example, or the RowRefused that it raises."""
    if isinstance(template, ModelChat):
        yield from template.rows_of_each(examples, loss_on)
        return
    for example in examples:
        try:
            yield template.rows(example, loss_on)
        except RowRefused as refused:
            yield refused


def _automatic(tokenizer: Any) -> tuple[str, str]:
    if tokenizer is None:
        return "alpaca", "no model is named yet"
    if own_template(tokenizer) is not None:
        return "chat", "the model has a chat template, which it has learned to answer in"
    return "alpaca", "the model has no chat template, so it gets the common instruction format"


def reference(example: Example) -> str:
    """What stands in the row where ``Template.prompt`` leaves off, as plain text."""
    if example.text is not None:
        return opening(example.text)[1]
    last = last_assistant(example)
    calls = () if last is None else example.messages[last].tool_calls
    written = [json.dumps(dict(call), ensure_ascii=False) for call in calls]
    return "\n".join(part for part in (example.answer, *written) if part)
