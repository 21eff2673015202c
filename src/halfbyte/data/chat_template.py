"""Rows in the model's own chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from halfbyte.data.batch import Segment
from halfbyte.data.chat_render import Answer, ChatRender, Request, TemplateFailed
from halfbyte.data.example import Example, Message
from halfbyte.data.template_process import BATCH, BATCH_CHARACTERS, TemplateStopped
from halfbyte.data.text_rows import opening, text_segments
from halfbyte.data.tokenize import leading_text
from halfbyte.data.turns import (
    Conversation,
    PromptLost,
    RowRefused,
    Turn,
    holds,
    last_assistant,
    learned_messages,
    nothing_learned,
    segments_of,
    trace,
)
from halfbyte.errors import DataError
from halfbyte.recipe.data_schema import LossOn

# What Llama 3's own template falls back to.
PINNED = date(2024, 7, 26)
DATED = (
    f"the model's chat template writes the current date into each prompt; here and in the "
    f"adapter's folder it is always {PINNED.day} {PINNED:%B %Y}, so that what is prompted is what "
    "was trained."
)
NO_END = (
    "the model's chat template leaves the token that ends a turn out of what it marks as the "
    "assistant's; it is learned all the same, since the model would not learn to stop."
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
    """Conversations as the model's own template writes them.

    A question that stands apart in a row becomes the user's message: the instruction, a blank
    line and the input, or either alone where the other is empty.
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
        self._chat = ChatRender(self._own, tokenizer)
        self._replay: _Replay | None = None
        self._system = system
        self._instruction = instruction
        self._eos = tokenizer.eos_token or ""
        if self._chat.marks_answers and self._marks_no_end():
            self.warnings.append(NO_END)

    @property
    def reads(self) -> frozenset[str]:
        fields = ["instruction", "input"] if self._instruction is None else ["input"]
        return self._chat.reads.union(fields)

    def question(self, example: Example) -> str:
        if _has_question(example):
            instruction = example.instruction if self._instruction is None else self._instruction
            return "\n\n".join(part for part in (instruction, example.input) if part)
        return opening(example.text)[0] if example.text is not None else example.asked

    def prompt(self, example: Example) -> str:
        if example.text is not None:
            return opening(example.text)[0]
        last = last_assistant(example)
        before = example.messages if last is None else example.messages[:last]
        messages = self._messages(replace(example, messages=before))
        return self._render(example, [messages], generate=True)[0]

    def rows(self, example: Example, loss_on: LossOn) -> list[tuple[Example, list[Segment]]]:
        if example.text is not None:
            return [(example, text_segments(example, self._eos))]
        learned = learned_messages(example, loss_on)
        if not learned:
            raise nothing_learned(example, loss_on)
        traced = self._traced(example, learned[-1:] if loss_on == "all" else learned, loss_on)
        found: list[tuple[Example, list[Segment]]] = []
        for text, turns in traced:
            part = example
            if len(traced) > 1:
                places = tuple(turn.message for turn in turns)
                until = example.messages[: places[-1] + 1]
                part = replace(example, messages=until, turns=places)
            spans = [span for turn in turns for span in turn.spans]
            found.append((part, segments_of(text, spans, loss_on == "all")))
        return found

    def rows_of_each(
        self, examples: Iterable[Example], loss_on: LossOn
    ) -> Iterator[list[tuple[Example, list[Segment]]] | RowRefused]:
        """What ``rows`` makes of each, or raises of it.

        Where the template is rendered in a process of its own, many are there together.
        """
        if not self._chat.apart:
            for example in examples:
                try:
                    yield self.rows(example, loss_on)
                except RowRefused as refused:
                    yield refused
            return
        batch: list[Example] = []
        characters = 0
        for example in examples:
            batch.append(example)
            characters += sum(len(message.content) for message in example.messages)
            if len(batch) == BATCH or characters > BATCH_CHARACTERS:
                yield from self._together(batch, loss_on)
                batch, characters = [], 0
        yield from self._together(batch, loss_on)

    def _together(
        self, examples: Sequence[Example], loss_on: LossOn
    ) -> list[list[tuple[Example, list[Segment]]] | RowRefused]:
        """As ``rows_of_each``, of a few.

        What ``rows`` asks the template depends on the example and on what the template answered
        before. So it is called again and again, each time with one answer more, and what all
        examples ask for next is asked for at once.
        """
        found: list[list[tuple[Example, list[Segment]]] | RowRefused | None] = [None] * len(
            examples
        )
        replays = {place: _Replay() for place in range(len(examples))}
        while replays:
            for place, replay in list(replays.items()):
                self._replay = replay.again()
                try:
                    found[place] = self.rows(examples[place], loss_on)
                except _Asks:
                    continue
                except RowRefused as refused:
                    found[place] = refused
                finally:
                    self._replay = None
                del replays[place]
            places = list(replays)
            if not places:
                break
            try:
                answers = self._chat.ask([replays[place].asked for place in places])
            except TemplateStopped as stopped:
                at = examples[places[min(stopped.place, len(places) - 1)]].at
                raise TemplateStopped(
                    stopped.what, stopped.place, f"the model's chat template, at {at},"
                ) from None
            for place, answer in zip(places, answers, strict=True):
                replays[place].answers.append(answer)
        return [rows for rows in found if rows is not None]

    def segments(self, example: Example, loss_on: LossOn) -> list[Segment]:
        rows = self.rows(example, loss_on)
        if len(rows) > 1:
            raise RowRefused(
                example,
                "the chat template writes earlier answers otherwise than they were given, so that "
                "each has to be trained in a row of its own",
            )
        return rows[0][1]

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
        sample = self._render(Example(0), [[{"role": "user", "content": "a"}]], generate=True)[0]
        lead = leading_text(self._tokenizer, sample)
        if parts or lead:
            # Ends as an expression, after which, unlike after a block, white space is kept.
            parts.append(f"{{{{- {lead or repr('')} }}}}")
        return "".join([*parts, self._own])

    def _traced(
        self, example: Example, wanted: Sequence[int], loss_on: LossOn
    ) -> list[tuple[str, list[Turn]]]:
        """The texts in which the ``wanted`` messages of ``example`` are trained, checked."""
        messages = self._messages(example)
        # A question and a system message that are no messages of the row stand before all others.
        shift = len(messages) - len(example.messages)
        closing = self._chat.closing if len(wanted) > 1 else ""

        def render(conversations: Sequence[Conversation], *, generate: bool) -> list[str]:
            return self._render(example, conversations, generate=generate)

        try:
            traced = trace(render, messages, [at + shift for at in wanted], closing)
        except PromptLost as lost:
            raise RowRefused(
                example,
                "the model's chat template writes a prompt otherwise once its answer follows "
                f"({lost}), so that what was trained would not be what is prompted; {ELSE}",
            ) from lost
        found: list[tuple[str, list[Turn]]] = []
        for text, turns in traced:
            until = turns[-1].message + 1
            if self._chat.marks_answers and loss_on != "all":
                request = Request([messages[:until]], example.tools, marks=True)
                answer = self._answer(example, request)
                whole, marks = answer.texts[0], answer.marks
                if whole == text:
                    turns = [replace(t, spans=self._marked(text, t, marks)) for t in turns]
            turns = [replace(turn, message=turn.message - shift) for turn in turns]
            self._check(example, example.messages[: until - shift], text, turns)
            found.append((text, turns))
        return found

    def _marked(
        self, text: str, turn: Turn, marks: Sequence[tuple[int, int]]
    ) -> tuple[tuple[int, int], ...]:
        """What of a turn the template marks as the assistant's, and what ends the turn.

        A mark may begin with the header, which is prompted and not learned.
        """
        [(start, end)] = turn.spans
        spans = [(max(a, start), min(b, end)) for a, b in marks if a < end and b > start]
        if spans and not self._chat.ends_turn(text[slice(*spans[-1])]):
            first, last = spans[-1]
            spans[-1] = first, last + self._chat.end_of_turn_in(text[last:end])
        return tuple(spans)

    def _check(
        self, example: Example, messages: Sequence[Message], text: str, turns: Sequence[Turn]
    ) -> None:
        """That what was asked, and what tools gave, stands before the answer to it, and that what
        is learned is what was said."""
        seen = end = 0
        for turn in turns:
            before = text[end : turn.spans[0][0] if turn.spans else len(text)]
            for place in range(seen, turn.message):
                message = messages[place]
                if message.role in ("user", "tool") and not holds(before, message.content):
                    raise RowRefused(
                        example,
                        f"the model's chat template has no place for message {place + 1}, of the "
                        f"role {message.role}; {ELSE}",
                    )
            message = messages[turn.message]
            learned = "".join(text[start:stop] for start, stop in turn.spans)
            names = [str(call.get("function", call).get("name")) for call in message.tool_calls]
            if not all(holds(learned, said) for said in (message.content, *names)):
                raise RowRefused(
                    example,
                    "the model's chat template leaves out, or does not mark as the assistant's, "
                    f"a part of message {turn.message + 1}; {ELSE}",
                )
            seen = turn.message + 1
            end = turn.spans[-1][1] if turn.spans else end

    def _marks_no_end(self) -> bool:
        """Whether the template marks an answer, but not the token that ends it."""
        asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        try:
            text, marks = self._chat.with_marks([asked, said])
        except TemplateFailed:
            return False
        if not marks or self._chat.ends_turn(text[slice(*marks[-1])]):
            return False
        return self._chat.end_of_turn_in(text[marks[-1][1] :]) > 0

    def _messages(self, example: Example) -> list[dict[str, Any]]:
        messages = list(example.messages)
        stated = bool(messages) and messages[0].role == "system"
        if _has_question(example):
            messages.insert(int(stated), Message("user", self.question(example)))
        elif self._instruction is not None:
            raise DataError(
                "data.instruction is for rows of questions and answers, and there are "
                "conversations; state data.system in its place."
            )
        if self._system is not None and not stated:
            messages.insert(0, Message("system", self._system))
        return self._chat.messages(messages)

    def _render(
        self, example: Example, conversations: Sequence[Conversation], *, generate: bool
    ) -> list[str]:
        return self._answer(example, Request(conversations, example.tools, generate)).texts

    def _answer(self, example: Example, request: Request) -> Answer:
        if self._replay is None:
            [answer] = self._chat.ask([request])
        else:
            answer = self._replay.answer(request)
        if isinstance(answer, TemplateFailed):
            raise RowRefused(
                example, f"the model's chat template does not take it ({answer}); {ELSE}"
            ) from answer
        return answer


class _Asks(Exception):
    """The template is asked for something that it has not answered yet."""


class _Replay:
    """The template's answers to what was asked for an example so far, in their order."""

    def __init__(self) -> None:
        self.answers: list[Answer | TemplateFailed] = []
        self.asked: Request
        self._given = 0

    def again(self) -> _Replay:
        """Give them from the first one on."""
        self._given = 0
        return self

    def answer(self, request: Request) -> Answer | TemplateFailed:
        """The next one. Raises _Asks where there is none."""
        if self._given == len(self.answers):
            self.asked = request
            raise _Asks
        self._given += 1
        return self.answers[self._given - 1]


def _has_question(example: Example) -> bool:
    return example.instruction is not None or example.input is not None
