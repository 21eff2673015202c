"""What is learned of conversations in the chat templates of real models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from chat_case import (
    CONVERSATIONS,
    FAMILIES,
    WEATHER,
    Marked,
    byte_tokenizer,
    marked_rows,
    tokenizer_of,
)
from halfbyte.data.batch import Segment
from halfbyte.data.chat_template import ModelChat
from halfbyte.data.example import Example, Message
from halfbyte.data.template import make_template
from halfbyte.data.tokenize import tokenize_rows
from halfbyte.data.turns import RowRefused
from halfbyte.recipe.data_schema import DataRecipe, LossOn
from halfbyte.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent

MARKED = marked_rows()
IDS = [f"{name}, {title}" for name, title, _ in MARKED]
# What may stand behind an answer where it is the last.
ENDS = ("»", "»\n", "<|endoftext|>»")


def pieces(segments: Sequence[Segment]) -> list[tuple[str, bool]]:
    """Segments as runs of text that is learned or not."""
    found: list[tuple[str, bool]] = []
    for segment in segments:
        if found and found[-1][1] == segment.learn:
            found[-1] = (found[-1][0] + segment.text, segment.learn)
        elif segment.text:
            found.append((segment.text, segment.learn))
    return found


def rows(template: ModelChat, example: Example, loss_on: LossOn) -> list[list[tuple[str, bool]]]:
    return [pieces(segments) for _, segments in template.rows(example, loss_on)]


def text_of(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def as_openai(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a program that uses the adapter has them."""
    found: list[dict[str, Any]] = []
    for message in messages:
        one: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning is not None:
            one["reasoning_content"] = message.reasoning
        if message.tool_calls:
            one["tool_calls"] = [
                {
                    "type": "function",
                    "id": call["id"],
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            one["tool_call_id"], one["name"] = message.tool_call_id, message.name
        found.append(one)
    return found


def rendered(
    template: ModelChat, tokenizer: Any, example: Example, count: int, *, generate: bool
) -> str:
    """What transformers makes of the first messages with the template of the adapter's folder."""
    return str(
        tokenizer.apply_chat_template(
            as_openai(example.messages[:count]),
            tools=[dict(tool) for tool in example.tools] or None,
            chat_template=template.chat_template(),
            tokenize=False,
            add_generation_prompt=generate,
        )
    )


def test_every_template_has_marked_rows() -> None:
    assert {name for name, _, _ in MARKED} == set(FAMILIES)
    assert len(FAMILIES) >= 12


@pytest.mark.parametrize(("name", "title", "expected"), MARKED, ids=IDS)
def test_what_is_learned_is_what_was_marked_by_hand(
    name: str, title: str, expected: list[Marked] | str
) -> None:
    template, example = ModelChat(tokenizer_of(name)), CONVERSATIONS[title]
    if isinstance(expected, str):
        with pytest.raises(RowRefused) as caught:
            template.rows(example, "answer")
        assert expected in str(caught.value)
        assert str(caught.value).startswith("row 1: ")
        return

    def check(found: Sequence[Sequence[Segment]], wanted: Sequence[Marked]) -> None:
        assert len(found) == len(wanted)
        for segments, marked in zip(found, wanted, strict=True):
            assert marked.matches(pieces(segments)), pieces(segments)

    found = template.rows(example, "answer")
    check([segments for _, segments in found], expected)
    check([segments for _, segments in template.rows(example, "assistant")], expected)
    last = template.segments(example, "last")
    check([last], [expected[-1].only(-1)])
    everything = template.segments(example, "all")
    assert pieces(everything) == [(text_of(last), True)]
    # A row stands for itself once it was made.
    for part, segments in found:
        assert pieces(template.segments(part, "answer")) == pieces(segments)

    answers = [i for i, message in enumerate(example.messages) if message.role == "assistant"]
    flagged = with_flags(example, {answers[0]: True})
    [first] = rows(template, flagged, "flags")
    until = expected[0].text.partition("»")[0]
    assert any(Marked(f"{until}{end}").matches(first) for end in ENDS)
    excluded = with_flags(example, {answers[0]: False})
    check([s for _, s in template.rows(excluded, "answer")], [expected[-1].only(-1)])
    check([s for _, s in template.rows(excluded, "assistant")], expected)
    with pytest.raises(RowRefused, match="none of its answers is flagged"):
        template.rows(example, "flags")


def with_flags(example: Example, flags: dict[int, bool]) -> Example:
    messages = [replace(m, learn=flags.get(i)) for i, m in enumerate(example.messages)]
    return replace(example, messages=tuple(messages))


@pytest.mark.parametrize(
    ("name", "title"), [(n, t) for n, t, e in MARKED if not isinstance(e, str)]
)
def test_what_is_learned_is_what_is_prompted_for(name: str, title: str) -> None:
    tokenizer, example = tokenizer_of(name), CONVERSATIONS[title]
    template = ModelChat(tokenizer)
    for part, segments in template.rows(example, "answer"):
        count = len(part.messages)
        prompt = rendered(template, tokenizer, part, count - 1, generate=True)
        assert template.prompt(part) == prompt
        assert text_of(segments).startswith(prompt)
        if name.startswith("mistral") and title == "system":
            continue  # the template takes the system message back once the answer follows
        assert text_of(segments) == rendered(template, tokenizer, part, count, generate=False)


# Words, spaces, and what templates and formats themselves are made of.
PIECES = [
    *("Say", " it", "\n", "\n\n", "  ", "é", "字", "'", '"', "{{ x }}", "{% if %}", "\\n"),
    *("assistant", "<|im_", "user\n", "[INST", "think", "</s", "[{", "None"),
]
SPECIALS = ["<|im_end|>\n<|im_start|>assistant\n", "<|eot_id|>", "</s>", "[/INST]", "<|end|>\n"]


def said(extra: Sequence[str] = ()) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from([*PIECES, *extra]), max_size=5).map("".join)


@st.composite
def conversations(draw: st.DrawFn, *, system: bool = True, extra: Sequence[str] = ()) -> Example:
    """Turns of both sides, in order, perhaps with a system message and with flags."""
    messages = []
    if system and draw(st.booleans()):
        messages.append(Message("system", "Be kind." + draw(said(extra))))
    for _ in range(draw(st.integers(1, 4))):
        messages.append(Message("user", draw(said(extra))))
        flag = draw(st.sampled_from([None, True, False]))
        messages.append(Message("assistant", draw(said(extra)), learn=flag))
    return Example(draw(st.integers(0, 9)), tuple(messages))


LOSS_ON = st.sampled_from(["answer", "assistant", "last", "flags", "all"])
# Templates of TRL that mark what is to be learned, by whose special tokens they have.
TRAINING = {
    "llama3": "llama-3.1",
    "gemma": "gemma-2",
    "gemma3": "gemma-3",
    "phi3": "phi-3.5",
    "phi3_5": "phi-3.5",
    "qwen2_5": "qwen-2.5",
    "qwen3": "qwen-3",
    "lfm2": "lfm-2.5",
    "qwen3_instruct_2507": "qwen-2.5",
}
# Of these the same text is made by the model's own template, which marks nothing.
UNMARKED = {"gemma-2": "gemma", "gemma-3": "gemma3", "phi-3.5": "phi3_5", "qwen-2.5": "qwen2_5"}


def marking_tokenizer(name: str, family: str) -> Any:
    tokenizer = byte_tokenizer(FAMILIES[family].eos, FAMILIES[family].bos, FAMILIES[family].others)
    path = files("trl").joinpath(f"chat_templates/{name}_training.jinja")
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def mask_of_transformers(tokenizer: Any, example: Example) -> tuple[list[int], list[bool]]:
    encoded = tokenizer.apply_chat_template(
        as_openai(example.messages), return_assistant_tokens_mask=True, return_dict=True
    )
    return encoded["input_ids"], [bool(learned) for learned in encoded["assistant_masks"]]


def tokens(tokenizer: Any, segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
    [row] = tokenize_rows(tokenizer, [segments], [0])
    return row.input_ids.tolist(), row.loss_mask.tolist()


def spoken(example: Example) -> bool:
    return all(m.content.strip() for m in example.messages if m.role == "assistant")


@pytest.mark.parametrize("name", [*TRAINING, "lfm-2.5"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_marked_templates_give_the_mask_of_transformers(name: str, data: st.DataObject) -> None:
    family = TRAINING.get(name)
    tokenizer = tokenizer_of(name) if family is None else marking_tokenizer(name, family)
    example = data.draw(conversations(system=family != "gemma-2").filter(spoken))
    ids, mask = tokens(tokenizer, ModelChat(tokenizer).segments(example, "assistant"))
    expected_ids, expected = mask_of_transformers(tokenizer, example)
    assert ids == expected_ids
    if name == "qwen2_5":  # which marks the line break of the header too
        expected = [e and (i == 0 or expected[i - 1]) for i, e in enumerate(expected)]
    assert mask == expected


@pytest.mark.parametrize("name", list(UNMARKED))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_traced_labels_are_those_that_trl_marks(name: str, data: st.DataObject) -> None:
    tokenizer, marking = tokenizer_of(name), marking_tokenizer(UNMARKED[name], name)
    example = data.draw(conversations(system=name != "gemma-2").filter(spoken))
    ids, mask = tokens(tokenizer, ModelChat(tokenizer).segments(example, "assistant"))
    expected_ids, expected = mask_of_transformers(marking, example)
    assert ids == expected_ids
    if name == "qwen-2.5":
        expected = [e and (i == 0 or expected[i - 1]) for i, e in enumerate(expected)]
    assert mask == expected


@dataclass(frozen=True)
class Plain:
    """A template as anybody would write it down: what stands before and after each content."""

    before: str  # ROLE is the role
    after: str
    begin: str = ""
    strips: bool = False
    default_system: str | None = None
    at_the_end: str = ""  # behind the last message of all
    assistant: str = "assistant"  # what that role is called

    def parts(self, messages: Sequence[Message], learned: set[int]) -> list[tuple[str, bool]]:
        found = [(self.begin, False)]
        if self.default_system is not None and messages[0].role != "system":
            found += [(self.before.replace("ROLE", "system"), False)]
            found += [(self.default_system + self.after, False)]
        for place, message in enumerate(messages):
            role = self.assistant if message.role == "assistant" else message.role
            content = message.content.strip() if self.strips else message.content
            found.append((self.before.replace("ROLE", role), False))
            found.append((content + self.after, place in learned))
        return [*found, (self.at_the_end, True)]


class Llama2:
    def parts(self, messages: Sequence[Message], learned: set[int]) -> list[tuple[str, bool]]:
        found = []
        for place, message in enumerate(messages):
            if message.role == "user":
                found.append((f"<s>[INST] {message.content.strip()} [/INST]", False))
            else:
                found.append((f" {message.content.strip()} </s>", place in learned))
        return found


class Qwen3:
    """Thoughts, here always empty, before the last answer and no other."""

    def parts(self, messages: Sequence[Message], learned: set[int]) -> list[tuple[str, bool]]:
        *earlier, last = messages
        found = [(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n", False) for m in earlier]
        said = last.content.lstrip("\n")
        return [
            *found,
            ("<|im_start|>assistant\n", False),
            (f"<think>\n\n</think>\n\n{said}<|im_end|>\n", True),
        ]


CHATML = Plain("<|im_start|>ROLE\n", "<|im_end|>\n")
PLAIN: dict[str, Plain | Llama2 | Qwen3] = {
    "smollm-2": replace(
        CHATML,
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
    "qwen-2.5": replace(
        CHATML,
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "qwen-3": Qwen3(),
    "lfm-2.5": replace(CHATML, begin="<|startoftext|>"),
    "phi-4": Plain("<|im_start|>ROLE<|im_sep|>", "<|im_end|>"),
    "phi-3.5": Plain("<|ROLE|>\n", "<|end|>\n", at_the_end="<|endoftext|>"),
    "zephyr": Plain("<|ROLE|>\n", "</s>\n"),
    "gemma-2": Plain(
        "<start_of_turn>ROLE\n",
        "<end_of_turn>\n",
        begin="<bos>",
        strips=True,
        assistant="model",
    ),
    "granite-4": Plain(
        "<|start_of_role|>ROLE<|end_of_role|>",
        "<|end_of_text|>\n",
        default_system="You are a helpful assistant. Please ensure responses are professional, "
        "accurate, and safe.",
    ),
    "llama-2": Llama2(),
}


def reference(name: str, example: Example, loss_on: LossOn) -> list[list[tuple[str, bool]]]:
    """The rows and what is learned of them, as one would do it by hand."""
    learned = []
    for place, message in enumerate(example.messages):
        if message.role != "assistant" or not message.content.strip():
            continue
        is_last = place == len(example.messages) - 1
        if {
            "answer": message.learn in (None, True),
            "assistant": True,
            "last": is_last,
            "flags": message.learn is True,
            "all": True,
        }[loss_on]:
            learned.append(place)
    if not learned:
        return []
    template = PLAIN[name]
    if loss_on == "all":
        parts = template.parts(example.messages[: learned[-1] + 1], set(learned))
        return [[(text, True) for text, _ in parts]]
    if isinstance(template, Qwen3):
        return [template.parts(example.messages[: place + 1], {place}) for place in learned]
    return [template.parts(example.messages[: learned[-1] + 1], set(learned))]


@pytest.mark.parametrize("name", list(PLAIN))
@settings(max_examples=60, deadline=None)
@given(data=st.data(), loss_on=LOSS_ON)
def test_labels_are_those_of_a_slow_reference(
    name: str, data: st.DataObject, loss_on: LossOn
) -> None:
    tokenizer = tokenizer_of(name)
    system = name not in ("gemma-2", "llama-2")
    example = data.draw(conversations(system=system, extra=SPECIALS))
    expected = reference(name, example, loss_on)
    if not expected:
        with pytest.raises(RowRefused, match=rf"row {example.row + 1}: .*answer"):
            ModelChat(tokenizer).rows(example, loss_on)
        return
    found = ModelChat(tokenizer).rows(example, loss_on)
    assert len(found) == len(expected)
    for (_, segments), parts in zip(found, expected, strict=True):
        ids: list[int] = []
        mask: list[bool] = []
        for text, learn in parts:
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            mask += [learn] * len(piece)
        mask[0] = False  # nothing predicts it
        assert tokens(tokenizer, segments) == (ids, mask)


@st.composite
def spoken_words(draw: st.DrawFn) -> Example:
    """A conversation of which each message, thought and call holds a word that no other holds."""
    number = 0

    def word(pieces: Sequence[str] = PIECES) -> str:
        nonlocal number
        number += 1
        before, after = draw(st.sampled_from(["", *pieces])), draw(st.sampled_from(["", *pieces]))
        return f"{before}w{number}w{after}"

    messages = [Message("system", word())] if draw(st.booleans()) else []
    calls = draw(st.booleans())
    for turn in range(draw(st.integers(1, 3))):
        messages.append(Message("user", word()))
        if calls and draw(st.booleans()):
            call = {"id": f"call0000{turn}", "name": "weather", "arguments": {"city": word([])}}
            text = word() if draw(st.booleans()) else ""
            messages.append(Message("assistant", text, tool_calls=(call,)))
            messages.append(Message("tool", word(), tool_call_id=call["id"], name="weather"))
        thought = word() if draw(st.booleans()) else None
        messages.append(Message("assistant", word(), reasoning=thought))
    return Example(0, tuple(messages), tools=(WEATHER,) if calls else ())


def words_in(text: str) -> list[str]:
    return re.findall(r"w\d+w", text)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"deepseek-r1-distill"}))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(example=spoken_words(), last=st.booleans())
def test_each_answer_is_learned_once_with_its_end_and_nothing_else_is(
    name: str, example: Example, last: bool
) -> None:
    tokenizer = tokenizer_of(name)
    template = ModelChat(tokenizer)
    try:
        found = template.rows(example, "last" if last else "answer")
    except RowRefused:
        assume(False)
    places = [i for i, m in enumerate(example.messages) if m.role == "assistant"]
    expected: list[str] = []
    thoughts: set[str] = set()
    for place in places[-1:] if last else places:
        message = example.messages[place]
        expected += words_in(message.content)
        expected += words_in(str([call["arguments"] for call in message.tool_calls]))
        thoughts |= set(words_in(message.reasoning or ""))
    learned = [text for _, segments in found for text, learn in pieces(segments) if learn]
    words = [word for text in learned for word in words_in(text)]
    # A template may leave thoughts out, but learns none twice, and none of another answer.
    assert sorted(word for word in words if word not in thoughts) == sorted(expected)
    assert len(set(words)) == len(words)
    ends = {FAMILIES[name].eos, *FAMILIES[name].others}
    place_of = {
        word: place
        for place in places
        for word in words_in(
            f"{example.messages[place].content}{example.messages[place].tool_calls}"
        )
    }
    for _, segments in found:
        before = ""
        for text, learn in pieces(segments):
            if learn:
                assert any(text.rstrip().endswith(end) for end in ends), text
                place = next(place_of[word] for word in words_in(text) if word in place_of)
                # Learning begins where a model is prompted, or behind that.
                assert before.startswith(
                    rendered(template, tokenizer, example, place, generate=True)
                )
            before += text


def test_the_table_in_the_docs_is_what_was_marked_by_hand() -> None:
    marked = {(name, title): rows for name, title, rows in MARKED}
    table = (ROOT / "docs" / "templates.md").read_text(encoding="utf-8")
    shown = set()
    for line in table.splitlines():
        if named := re.match(r"\| `chat` \| .*\(`(.*?)`\) \| (.*) \|$", line):
            name, cell = named.groups()
            shown.add(name)
            found = re.findall("`([^`]*)`", cell.replace("\\|", "|").replace("↵", "\n"))
            title = "turns" if name in ("gemma-2", "deepseek-r1-distill") else "system"
            expected = marked[name, title]
            refused = isinstance(expected, str)
            assert found == ([] if refused else [row.text for row in expected])
            assert cell.startswith("refused") == isinstance(marked.get((name, "system"), ""), str)
    assert shown == set(FAMILIES) - {"chatml-generation"}


@pytest.mark.parametrize("name", ["alpaca", "plain", "a text of its own"])
def test_the_table_in_the_docs_shows_text_formats_as_they_are(name: str) -> None:
    docs = (ROOT / "docs" / "templates.md").read_text(encoding="utf-8")
    [line] = [line for line in docs.splitlines() if re.match(rf"\| `?{name}`? \| .*«", line)]
    recipe = load_recipe(ROOT / "recipes" / "tinyllama-chatdoctor.yaml")
    data = DataRecipe(path="x", template=recipe.data.template if " " in name else name)
    template, _ = make_template(data, byte_tokenizer("</s>"))
    found = pieces(template.segments(CONVERSATIONS["system"], "answer"))
    [cell] = re.findall("`([^`]*«[^`]*)`", line.replace("↵", "\n"))
    assert Marked(cell).pieces == found
