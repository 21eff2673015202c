"""Formats that are a text with places for instruction, input and output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from halfbyte.data.batch import Segment
from halfbyte.data.example import Example
from halfbyte.data.text_rows import opening, text_segments
from halfbyte.data.tokenize import leading_text
from halfbyte.data.turns import (
    RowRefused,
    last_assistant,
    learned_messages,
    nothing_learned,
)
from halfbyte.errors import DataError
from halfbyte.recipe.data_schema import LossOn

FIELDS = ("instruction", "input", "output")


@dataclass(frozen=True)
class TextFormat:
    """The text around a question.

    A question with an input is instruction + ``between`` + input (or the other way round, with
    ``input_first``), and its prompt is ``head`` + question + ``tail``; one without an input is
    the instruction alone in ``bare_head`` and ``bare_tail``. With ``between`` None there is one
    field only, named by ``only``, and one frame. Whether a question has an input is seen by
    whether ``between`` is in it, here and in the chat template alike.
    """

    name: str
    head: str
    tail: str
    between: str | None = None
    input_first: bool = False
    bare_head: str = ""
    bare_tail: str = ""
    only: str = "instruction"

    def question(self, instruction: str, input: str) -> str:
        if self.between is None:
            return instruction if self.only == "instruction" else input
        framed_alike = (self.head, self.tail) == (self.bare_head, self.bare_tail)
        if not input and (framed_alike or self.between not in instruction):
            return instruction
        parts = (input, instruction) if self.input_first else (instruction, input)
        return self.between.join(parts)

    def prompt(self, question: str) -> str:
        if self.between is None or self.between in question:
            return self.head + question + self.tail
        return self.bare_head + question + self.bare_tail

    def with_instruction(self, instruction: str) -> TextFormat:
        """The format in which the instruction is part of the frame and the question the input."""
        if self.between is None:
            raise DataError(
                "data.instruction gives all rows one instruction, so data.template needs both "
                "{instruction} and {input}."
            )
        fixed = replace(self, between=None, only="input")
        if self.input_first:
            return replace(fixed, tail=self.between + instruction + self.tail)
        return replace(fixed, head=self.head + instruction + self.between)


# The format of Stanford Alpaca, whose two openings tell whether an input follows.
ALPACA = TextFormat(
    name="alpaca",
    head="Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n",
    between="\n\n### Input:\n",
    tail="\n\n### Response:\n",
    bare_head="Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n",
    bare_tail="\n\n### Response:\n",
)
PLAIN = TextFormat(
    name="plain", head="", between="\n\n", tail="\n\n", bare_head="", bare_tail="\n\n"
)


def parse_format(text: str) -> TextFormat:
    """The format that ``data.template`` spells out.

    ``{instruction}`` and ``{input}`` stand at most once each and at least one of them does;
    ``{output}`` ends the text (a line break after it, as YAML blocks have one, is no part of the
    format). A brace that is meant as one is doubled: ``{{``. Raises DataError otherwise.
    """
    fixed, fields = _parse(text)
    if not fields:
        raise DataError(
            f"data.template: {_shorten(text)} is none of auto, chat, alpaca and plain, and as a "
            "text of your own it needs {instruction} or {input}, and {output} at its end."
        )
    if fields[-1] != "output" or fixed[-1].strip("\n") or fields.count("output") > 1:
        raise DataError("data.template must end with {output}, once: the answer is what follows.")
    fields = fields[:-1]
    if not fields or len(set(fields)) < len(fields):
        raise DataError("data.template must hold {instruction}, {input} or both, once each.")
    if len(fields) == 1:
        return TextFormat("custom", head=fixed[0], tail=fixed[1], only=fields[0])
    head, between, tail = fixed[:3]
    if not between:
        raise DataError(
            "data.template has nothing between {instruction} and {input}, so that a chat could "
            "not tell one from the other; put at least a line break there."
        )
    if fields[0] == "input":
        bare_head, bare_tail = head + between, tail
    else:
        bare_head, bare_tail = head, between + tail
    return TextFormat(
        "custom",
        head=head,
        between=between,
        tail=tail,
        input_first=fields[0] == "input",
        bare_head=bare_head,
        bare_tail=bare_tail,
    )


def _parse(text: str) -> tuple[list[str], list[str]]:
    """The fixed texts and the fields between them; one more text than there are fields."""
    fixed, fields = [""], []
    try:
        for literal, field, spec, conversion in Formatter().parse(text):
            fixed[-1] += literal
            if field is None:
                continue
            if field not in FIELDS or spec or conversion:
                raise DataError(
                    f"data.template: {{{field}}} is no place that a row can fill; there are "
                    "{instruction}, {input} and {output}, and a brace meant as one is written {{ "
                    "or }}."
                )
            fields.append(field)
            fixed.append("")
    except ValueError as error:
        raise DataError(
            f"data.template has a brace that is not closed or not opened ({error}); a brace meant "
            "as one is written {{ or }}."
        ) from error
    return fixed, fields


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


class TextTemplate:
    """Rows in a TextFormat, ended by the tokenizer's end-of-sequence token."""

    warnings: Sequence[str] = ()

    def __init__(
        self, format: TextFormat, tokenizer: Any = None, *, instruction: str | None = None
    ) -> None:
        self.format = format if instruction is None else format.with_instruction(instruction)
        self._asked = format
        self._instruction = instruction
        self._tokenizer = tokenizer
        self._eos = (tokenizer.eos_token if tokenizer is not None else None) or ""

    @property
    def name(self) -> str:
        return self.format.name

    @property
    def reads(self) -> frozenset[str]:
        if self.format.between is None:
            return frozenset([self.format.only, "system"])
        return frozenset(["instruction", "input", "system"])

    def question(self, example: Example) -> str:
        if example.text is not None:
            return opening(example.text)[0]
        if example.instruction is None and example.input is None:
            return example.asked
        return self.format.question(example.instruction or "", example.input or "")

    def prompt(self, example: Example) -> str:
        if example.text is not None:
            return opening(example.text)[0]
        return "".join(text for text, _ in self._pieces(example, last_assistant(example)))

    def rows(self, example: Example, loss_on: LossOn) -> list[tuple[Example, list[Segment]]]:
        return [(example, self.segments(example, loss_on))]

    def segments(self, example: Example, loss_on: LossOn) -> list[Segment]:
        if example.text is not None:
            return text_segments(example, self._eos)
        learned = learned_messages(example, loss_on)
        if not learned:
            raise nothing_learned(example, loss_on)
        # What follows the last one is neither learned nor seen by what is.
        pieces = self._pieces(example, learned[-1] + 1)
        return [Segment(text, loss_on == "all" or at in learned) for text, at in pieces]

    def _pieces(self, example: Example, until: int | None) -> list[tuple[str, int | None]]:
        """The texts of the messages before ``until``, an answer's with the place of its message.

        They stand one after another, each user's in the format's frame.
        """
        asked = example.instruction is not None or example.input is not None
        system = ""
        found: list[tuple[str, int | None]] = []
        for at, message in enumerate(example.messages[:until]):
            if message.role == "tool" or message.tool_calls:
                raise RowRefused(
                    example,
                    f"the template {self.name} has no place for tool calls and their results; "
                    "state data.template: chat, with a model whose chat template has one",
                )
            if message.role == "system":
                system = message.content
            elif message.role == "user":
                found.append((self._frame(message.content, system), None))
            else:
                if asked:
                    found.append((self._frame(self.question(example), system), None))
                    asked = False
                # An answer may bring its end along; it is not written twice.
                end = "" if self._eos and message.content.endswith(self._eos) else self._eos
                found += [(message.content, at), (end, at)]
        if asked:
            found.append((self._frame(self.question(example), system), None))
        return found

    def _frame(self, content: str, system: str) -> str:
        """A user's message in the format; a system message takes the instruction's place."""
        if self._instruction is not None and system:
            return self._asked.with_instruction(system).prompt(content)
        if self._instruction is not None or not system:
            return self.format.prompt(content)
        joint = "\n\n" if self.format.between is None else self.format.between
        parts = (content, system) if self.format.input_first else (system, content)
        return self.format.prompt(joint.join(parts))

    def chat_template(self) -> str:
        """Each user message in the format's frame, each answer with its end of sequence.

        A system message takes the place of the instruction, and the user's message is then the
        input.
        """
        asked = self._asked
        lead = leading_text(self._tokenizer, self.format.prompt("a"))
        message = "message['content']"
        if self._instruction is not None:
            # One instruction for all rows: the question is the input.
            head, between, tail = asked.head, str(asked.between), asked.tail
            said = f"(ns.system or {_quote(self._instruction)})"
            if asked.input_first:
                opening = f"{_quote(head)} + {message}"
                closing = f"{_quote(between)} + {said} + {_quote(tail)}"
            else:
                opening = f"{_quote(head)} + {said} + {_quote(between)} + {message}"
                closing = _quote(tail)
            user = [f"{{{{- {opening} -}}}}", *_if_answer_follows(f"{{{{- {closing} -}}}}")]
        else:
            user = _framed(self.format)
        return "".join(
            [
                "{%- set ns = namespace(system='') -%}",
                *([f"{{{{- {lead} -}}}}"] if lead else []),
                "{%- for message in messages -%}",
                "{%- if message['role'] == 'system' -%}",
                "{%- set ns.system = message['content'] -%}",
                "{%- elif message['role'] == 'user' -%}",
                *user,
                "{%- elif message['role'] == 'assistant' -%}",
                f"{{{{- {message} -}}}}",
                # As in training, not twice behind an answer that brings it along.
                f"{{%- if not {message}.endswith(eos_token) -%}}" if self._eos else "",
                "{{- eos_token -}}{%- endif -%}" if self._eos else "",
                "{%- endif -%}",
                "{%- endfor -%}",
            ]
        )


def _framed(format: TextFormat) -> list[str]:
    between = format.between
    joint = _quote("\n\n" if between is None else between)
    parts = ("message['content']", "ns.system")
    first, second = parts if format.input_first else parts[::-1]
    lines = [
        f"{{%- set question = {first} + {joint} + {second} if ns.system "
        "else message['content'] -%}",
    ]
    whole = [
        f"{{{{- {_quote(format.head)} + question -}}}}",
        *_if_answer_follows(f"{{{{- {_quote(format.tail)} -}}}}"),
    ]
    bare = [
        f"{{{{- {_quote(format.bare_head)} + question -}}}}",
        *_if_answer_follows(f"{{{{- {_quote(format.bare_tail)} -}}}}"),
    ]
    if between is None or whole == bare:
        return lines + whole
    test = f"{_quote(between)} in question"
    return [*lines, f"{{%- if {test} -%}}", *whole, "{%- else -%}", *bare, "{%- endif -%}"]


def _if_answer_follows(line: str) -> list[str]:
    return ["{%- if add_generation_prompt or not loop.last -%}", line, "{%- endif -%}"]


def _quote(text: str) -> str:
    """``text`` as a Jinja string; its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
