"""Conversations in the formats that are texts: what stands there, what is learned, what a chat
program makes of the same messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_case import TURNS, byte_tokenizer
from halfbyte.data.example import Example, Message
from halfbyte.data.template import Template, make_template
from halfbyte.data.tokenize import tokenize_rows
from halfbyte.data.turns import RowRefused
from halfbyte.recipe.data_schema import DataRecipe, LossOn

END = "</s>"
CHATDOCTOR = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### output:\n{output}"
DOCTOR = "Answer as a doctor."
BELOW = "Below is an instruction that describes a task"
ALPACA_INPUT = (
    BELOW + ", paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n"
)
ALPACA_BARE = BELOW + ". Write a response that appropriately completes the request.\n\n"


# Each format's frame as one would write it down, of a user's words and the system message before.


def alpaca(asked: str, system: str) -> str:
    asked = f"{system}\n\n### Input:\n{asked}" if system else asked
    opening = ALPACA_INPUT if "\n\n### Input:\n" in asked else ALPACA_BARE
    return f"{opening}### Instruction:\n{asked}\n\n### Response:\n"


def plain(asked: str, system: str) -> str:
    return (f"{system}\n\n" if system else "") + f"{asked}\n\n"


def chatdoctor(asked: str, system: str) -> str:
    if system:
        return f"### Instruction:\n{system}\n\n### Input:\n{asked}\n\n### output:\n"
    if "\n\n### Input:\n" in asked:
        return f"### Instruction:\n{asked}\n\n### output:\n"
    return f"### Instruction:\n{asked}\n\n### Input:\n\n\n### output:\n"


def one_instruction(asked: str, system: str) -> str:
    return f"### Instruction:\n{system or DOCTOR}\n\n### Input:\n{asked}\n\n### output:\n"


def input_first(asked: str, system: str) -> str:
    if system:
        return f"Context: {asked}\nQuestion: {system}\nAnswer: "
    if "\nQuestion: " in asked:
        return f"Context: {asked}\nAnswer: "
    return f"Context: \nQuestion: {asked}\nAnswer: "


def question_alone(asked: str, system: str) -> str:
    return "Q: " + (f"{system}\n\n" if system else "") + f"{asked}\nA:"


Frame = Callable[[str, str], str]
FORMATS: dict[str, tuple[Frame, dict[str, Any]]] = {
    "alpaca": (alpaca, {"template": "alpaca"}),
    "plain": (plain, {"template": "plain"}),
    "chatdoctor": (chatdoctor, {"template": CHATDOCTOR}),
    "one instruction": (one_instruction, {"template": CHATDOCTOR, "instruction": DOCTOR}),
    "input first": (
        input_first,
        {"template": "Context: {input}\nQuestion: {instruction}\nAnswer: {output}"},
    ),
    "question alone": (question_alone, {"template": "Q: {instruction}\nA:{output}"}),
}
PIECES = ["Say", " it", "\n", "\n\n", "é", "字", "'", '"', "{{ x }}", "{% if %}", "\\n", END]
CONTENT = st.lists(
    st.sampled_from([*PIECES, "\n\n### Input:\n", "\nQuestion: ", "\n\n### Response:\n"]),
    max_size=5,
).map("".join)
LOSS_ON = st.sampled_from(["answer", "assistant", "last", "flags", "all"])


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    """Messages in nearly any order: an assistant may begin, a system message stand anywhere."""
    said: list[Message] = []
    for _ in range(draw(st.integers(1, 7))):
        others = {"system", "user", "assistant"} - {said[-1].role if said else ""}
        role = draw(st.sampled_from(sorted(others)))
        flag = draw(st.sampled_from([None, True, False])) if role == "assistant" else None
        said.append(Message(role, draw(CONTENT), learn=flag))
    return Example(draw(st.integers(0, 9)), tuple(said))


def template_of(tokenizer: Any, **data: Any) -> Template:
    return make_template(DataRecipe(path="x.json", **data), tokenizer)[0]


def written(frame: Frame, messages: Sequence[Message]) -> list[tuple[str, int | None]]:
    """The texts of the messages one after another, an answer's with its place."""
    system, found = "", []
    for place, message in enumerate(messages):
        if message.role == "system":
            system = message.content
        elif message.role == "user":
            found.append((frame(message.content, system), None))
        else:
            ended = message.content if message.content.endswith(END) else message.content + END
            found.append((ended, place))
    return found


def learned_places(example: Example, loss_on: LossOn) -> list[int]:
    spoken = [i for i, m in enumerate(example.messages) if m.role == "assistant"]
    flag = [example.messages[i].learn for i in spoken]
    wanted = {
        "answer": [f is not False for f in flag],
        "assistant": [True for _ in flag],
        "last": [i == spoken[-1] for i in spoken],
        "flags": [f is True for f in flag],
        "all": [True for _ in flag],
    }[loss_on]
    return [
        i for i, w in zip(spoken, wanted, strict=True) if w and example.messages[i].content.strip()
    ]


@pytest.mark.parametrize("name", list(FORMATS))
@settings(max_examples=80, deadline=None)
@given(example=conversations(), loss_on=LOSS_ON)
def test_labels_are_those_of_a_slow_reference(name: str, example: Example, loss_on: LossOn) -> None:
    frame, data = FORMATS[name]
    tokenizer = byte_tokenizer(END)
    template = template_of(tokenizer, **data)
    learned = learned_places(example, loss_on)
    if not learned:
        with pytest.raises(RowRefused, match=rf"row {example.row + 1}: "):
            template.rows(example, loss_on)
        return
    ids: list[int] = []
    mask: list[bool] = []
    for text, place in written(frame, example.messages[: learned[-1] + 1]):
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        mask += [loss_on == "all" or place in learned] * len(piece)
    mask[0] = False  # nothing predicts it
    [(part, segments)] = template.rows(example, loss_on)
    assert part is example
    [row] = tokenize_rows(tokenizer, [segments], [0])
    assert (row.input_ids.tolist(), row.loss_mask.tolist()) == (ids, mask)


@pytest.mark.parametrize("name", list(FORMATS))
@settings(max_examples=80, deadline=None)
@given(example=conversations())
def test_a_chat_program_makes_the_same_of_them(name: str, example: Example) -> None:
    """Of every beginning that ends in an answer, and of the prompt for each answer."""
    tokenizer = byte_tokenizer(END)
    template = template_of(tokenizer, **FORMATS[name][1])
    messages = example.messages
    spoken = [{"role": message.role, "content": message.content} for message in messages]

    def rendered(until: int, *, generate: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                spoken[:until],
                chat_template=template.chat_template(),
                add_generation_prompt=generate,
                tokenize=False,
            )
        )

    for place, message in enumerate(messages):
        if message.role != "assistant":
            continue
        until = replace(example, messages=messages[: place + 1])
        if place:  # transformers renders no conversation without messages
            assert template.prompt(until) == rendered(place, generate=True)
        if message.content.strip():
            segments = template.segments(until, "all")
            assert "".join(s.text for s in segments) == rendered(place + 1, generate=False)


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_model_without_an_end_of_sequence(name: str) -> None:
    tokenizer = byte_tokenizer(END)
    tokenizer.eos_token = None
    template = template_of(tokenizer, **FORMATS[name][1])
    spoken = [{"role": message.role, "content": message.content} for message in TURNS]
    text = tokenizer.apply_chat_template(
        spoken, chat_template=template.chat_template(), tokenize=False
    )
    segments = template.segments(Example(0, TURNS), "answer")
    assert "".join(s.text for s in segments) == text
    assert [s.text for s in segments if s.learn and s.text] == ["Four.", "Five."]
