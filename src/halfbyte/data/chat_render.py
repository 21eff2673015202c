"""A chat template at work: messages as it expects them, and the texts that it makes of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from halfbyte.data.example import Message
from halfbyte.data.jinja_sandbox import ChatTemplate
from halfbyte.data.known_templates import is_known
from halfbyte.data.template_process import Failed, template_process
from halfbyte.data.turns import Conversation
from halfbyte.foreign_json import parse_json

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Words that no template writes by itself, to see what becomes of them.
ASKED, SAID, MORE, RULE, THOUGHT = "qasked", "qsaid", "qmore", "qrule", "qthought"
CALL = {"name": "qcall", "arguments": {"qkey": "qvalue"}}


class TemplateFailed(Exception):
    """The template does not take a conversation; the text is its own reason."""


@dataclass(frozen=True)
class CallStyle:
    """How a template wants tool calls: OpenAI's way is ``as_text``, most want the object.

    ``short_ids``: Mistral's templates insist on identifiers of nine letters and digits.
    """

    as_text: bool = False
    short_ids: bool = False


@dataclass(frozen=True)
class Request:
    """Conversations to render, all up to where an answer begins or none; or one with its marks."""

    conversations: Sequence[Conversation]
    tools: Sequence[Mapping[str, Any]] = ()
    generate: bool = False
    marks: bool = False


@dataclass(frozen=True)
class Answer:
    """The text of each conversation of a request; ``marks`` of the one that asked for them."""

    texts: list[str]
    marks: list[tuple[int, int]]


class ChatRender:
    """Renders conversations in one chat template, with one tokenizer's special tokens.

    A template that is known not to do harm is rendered here, any other in the worker process.
    """

    def __init__(self, template: str, tokenizer: Any) -> None:
        self.template = template
        self.special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self.marks_answers = GENERATION.search(template) is not None
        self.apart = not is_known(template)
        self._here: ChatTemplate | None = None
        self._key = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
        if not self.apart:
            self._here = ChatTemplate(template)

    def __call__(
        self,
        conversations: Sequence[Conversation],
        *,
        generate: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[str]:
        """The text of each conversation; with ``generate`` up to where an answer begins.

        Raises TemplateFailed, and TemplateStopped where it takes too much.
        """
        return self._one(Request(conversations, tools, generate)).texts

    def with_marks(
        self, conversation: Conversation, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the characters of it that lie in ``{% generation %}`` blocks."""
        answer = self._one(Request([conversation], tools, marks=True))
        return answer.texts[0], answer.marks

    def ask(self, requests: Sequence[Request]) -> list[Answer | TemplateFailed]:
        """What becomes of each request; where the template takes too much TemplateStopped."""
        if self._here is not None:
            return [self._rendered(self._here, request) for request in requests]
        work = [
            ([list(c) for c in r.conversations], list(r.tools), r.generate, r.marks, self.special)
            for r in requests
        ]
        process = template_process()
        failed = process.open(self._key, source=self.template)
        if failed is not None:
            return [TemplateFailed(_words(failed))] * len(requests)
        answers = process.render({self._key: {"source": self.template}}, self._key, work)
        return [_answer(answer) for answer in answers]

    def _one(self, request: Request) -> Answer:
        [answer] = self.ask([request])
        if isinstance(answer, TemplateFailed):
            raise answer
        return answer

    def _rendered(self, template: ChatTemplate, request: Request) -> Answer | TemplateFailed:
        try:
            if request.marks:
                [conversation] = request.conversations
                text, marks = template.text_and_marks(conversation, request.tools, self.special)
                return Answer([text], _not_empty(marks))
            return Answer(
                [
                    template.text(conversation, request.tools, request.generate, self.special)
                    for conversation in request.conversations
                ],
                [],
            )
        except Exception as error:  # a template computes, and so raises, whatever it likes
            return _failed(error)

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as templates read them, tool calls in the way that this one wants."""
        style = CallStyle()
        if any(m.tool_calls or m.role == "tool" for m in messages):
            style = self._call_style
        return _as_dicts(messages, style)

    @cached_property
    def reads(self) -> frozenset[str]:
        """Those of ``system``, ``tools`` and ``reasoning`` that have a place in the template.

        What it refuses has one too: there the error tells.
        """
        user = Message("user", ASKED)
        tool = {
            "type": "function",
            "function": {
                "name": RULE,
                "description": RULE,
                "parameters": {"type": "object", "properties": {}},
            },
        }
        found = {
            "system": self._writes(RULE, [Message("system", RULE), user], generate=True),
            "tools": self._writes(RULE, [user], tools=[tool], generate=True),
            "reasoning": self._writes(
                THOUGHT, [user, Message("assistant", SAID, reasoning=THOUGHT)], generate=False
            ),
        }
        return frozenset(name for name, written in found.items() if written)

    @cached_property
    def closing(self) -> str:
        """What stands behind the last message of every conversation, as Phi 3's end of text.

        Empty where what follows an answer at the end also follows it in the middle.
        """
        one = [Message("user", ASKED), Message("assistant", SAID)]
        more = [*one, Message("user", MORE), Message("assistant", MORE)]
        try:
            last, going_on = self([_as_dicts(one), _as_dicts(more)], generate=False)
        except TemplateFailed:
            return ""
        at = 0
        while at < len(last) and last[at] == going_on[at : at + 1]:
            at += 1
        # A special token may begin like the one that stands there otherwise.
        for token in self._specials:
            for back in range(1, min(at, len(token) - 1) + 1):
                if last.startswith(token, at - back):
                    at -= back
                    break
        return "" if SAID in last[at:] else last[at:]

    def ends_turn(self, text: str) -> bool:
        """Whether ``text`` ends, but for spaces, in a token that is none of words."""
        return any(text.rstrip().endswith(token) for token in self._specials)

    def end_of_turn_in(self, text: str) -> int:
        """How many characters of ``text`` a special token at its beginning takes, spaces too."""
        spaces = len(text) - len(text.lstrip())
        found = [len(t) for t in self._specials if text.startswith(t, spaces)]
        return spaces + max(found) if found else 0

    @cached_property
    def _specials(self) -> list[str]:
        named = [value for value in self.special.values() if isinstance(value, str)]
        return [token for token in {*self._added, *named} if token.strip()]

    @cached_property
    def _call_style(self) -> CallStyle:
        """The first way in which the template writes a call and takes its result."""
        said = [
            Message("user", ASKED),
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", MORE, name="qcall"),
        ]
        tool = {"type": "function", "function": {"name": "qcall", "parameters": {}}}
        for as_text, short_ids in itertools.product((False, True), repeat=2):
            style = CallStyle(as_text, short_ids)
            try:
                [text] = self([_as_dicts(said, style)], generate=True, tools=[tool])
            except TemplateFailed:
                continue
            if "qvalue" in text and '\\"qvalue' not in text:
                return style
        return CallStyle()

    def _writes(
        self, word: str, said: Sequence[Message], *, generate: bool, tools: Sequence[Any] = ()
    ) -> bool:
        try:
            return word in self([_as_dicts(said)], generate=generate, tools=tools)[0]
        except TemplateFailed:
            return True


def _answer(found: Any) -> Answer | TemplateFailed:
    """An answer of the worker, of which only the kinds of its values are believed."""
    if isinstance(found, Failed):
        return TemplateFailed(_words(found))
    texts, marks = found
    return Answer([str(text) for text in texts], _not_empty((int(a), int(b)) for a, b in marks))


def _not_empty(marks: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(start, end) for start, end in marks if end > start]


def _words(failed: Failed) -> str:
    words = " ".join(failed.words.split()).rstrip(".") or failed.kind
    return words if failed.line is None else f"{words}, line {failed.line}"


def _failed(error: Exception) -> TemplateFailed:
    words = " ".join(str(error).split()).rstrip(".")
    return TemplateFailed(words or type(error).__name__)


def _as_dicts(messages: Sequence[Message], style: CallStyle | None = None) -> list[dict[str, Any]]:
    style = style or CallStyle()
    found: list[dict[str, Any]] = []
    waiting: list[str] = []  # calls whose results are still to come
    for place, message in enumerate(messages):
        one: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning is not None:
            # Templates read it under either name, and transformers gives them both.
            one["reasoning_content"] = one["thinking"] = message.reasoning
        if message.tool_calls:
            calls = [_call(c, f"{place}.{n}", style) for n, c in enumerate(message.tool_calls)]
            waiting = [call["id"] for call in calls]
            one["tool_calls"] = calls
        if message.role == "tool":
            number = message.tool_call_id
            if number is not None:
                number = _short(number) if style.short_ids else number
            elif waiting:
                number = waiting[0]
            if number in waiting:
                waiting.remove(number)
            if number is not None:
                one["tool_call_id"] = number
        if message.name is not None:
            one["name"] = message.name
        found.append(one)
    return found


def _call(call: Mapping[str, Any], place: str, style: CallStyle) -> dict[str, Any]:
    function: Mapping[str, Any] = call.get("function", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str) and not style.as_text:
        arguments = _object_in(arguments)
    elif not isinstance(arguments, str) and style.as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    number = str(call.get("id") or f"call{place}")
    return {
        "type": "function",
        "id": _short(number) if style.short_ids else number,
        "function": {"name": function.get("name", ""), "arguments": arguments},
    }


def _object_in(text: str) -> Any:
    """The object that ``text`` is the JSON of, else the text."""
    try:
        found = parse_json(text)
    except ValueError:
        return text
    return found if isinstance(found, dict) else text


def _short(number: str) -> str:
    """Nine letters and digits that stand for an identifier, the same for the same one."""
    if re.fullmatch(r"[A-Za-z0-9]{9}", number):
        return number
    return hashlib.sha256(number.encode()).hexdigest()[:9]
