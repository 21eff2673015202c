"""Texts as rows, and what templates do with what they have no place for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_case import (
    CALLED,
    SYSTEM,
    TURNS,
    WEATHER,
    byte_tokenizer,
    tokenizer_of,
)
from halfbyte.data.chat_template import ModelChat
from halfbyte.data.cleaning.picked import Picked
from halfbyte.data.example import Example, Message
from halfbyte.data.example_store import ExampleStore
from halfbyte.data.prepare import prepare
from halfbyte.data.rendered import Parts, Rendered, render
from halfbyte.data.template import Template, make_template, reference
from halfbyte.data.text_rows import opening
from halfbyte.data.tokenize import tokenize_rows
from halfbyte.data.turns import REFUSED, UNLEARNED, RowRefused
from halfbyte.errors import DataError
from halfbyte.recipe import Recipe
from halfbyte.recipe.data_schema import DataRecipe

STORY = "It was a dark and stormy night. The rain fell in torrents, but not for long."


def template_of(tokenizer: Any, template: str, *, texts: bool = False, **data: Any) -> Template:
    recipe = DataRecipe(path="x.json", template=template, **data)
    return make_template(recipe, tokenizer, texts=texts)[0]


@pytest.mark.parametrize("template", ["auto", "chat", "alpaca", "plain", "text"])
@pytest.mark.parametrize("loss_on", ["answer", "assistant", "last", "flags", "all"])
def test_a_text_is_learned_whole_in_every_template(template: str, loss_on: Any) -> None:
    tokenizer = tokenizer_of("qwen-2.5")
    made = template_of(tokenizer, template, texts=template == "auto")
    for text in (STORY, STORY + "<|im_end|>"):
        [(part, segments)] = made.rows(Example(3, text=text), loss_on)
        assert part.text == text
        [row] = tokenize_rows(tokenizer, [segments], [3])
        assert tokenizer.decode(row.input_ids) == STORY + "<|im_end|>"
        assert row.loss_mask[1:].all()
    example = Example(3, text=STORY)
    assert made.prompt(example) + reference(example) == STORY
    assert made.question(example) == made.prompt(example) == "It was a dark and stormy night. The"


def test_data_of_texts_takes_no_template(tmp_path: Any) -> None:
    tokenizer = tokenizer_of("qwen-2.5")
    made, [choice] = make_template(DataRecipe(path="x"), tokenizer, texts=True)
    assert (made.name, choice.value) == ("text", "text")
    # The adapter's folder keeps the model's own, which texts do not change.
    assert made.chat_template() == tokenizer.chat_template
    bare = byte_tokenizer("</s>")
    joined = template_of(bare, "text").chat_template()
    messages = [{"role": "user", "content": "It was"}, {"role": "assistant", "content": " dark."}]
    assert bare.apply_chat_template(messages, chat_template=joined, tokenize=False) == (
        "It was dark."
    )
    with pytest.raises(RowRefused, match="row 1: the template text takes texts"):
        made.rows(Example(0, TURNS), "answer")
    with pytest.raises(RowRefused, match="row 5: it holds no text"):
        made.rows(Example(4, text=" \n"), "answer")


@pytest.mark.parametrize("text", ["a", "ab", "oneword", "two words", "字字字字", "a" * 3000])
def test_an_opening_is_a_part_of_its_text(text: str) -> None:
    begin, rest = opening(text)
    assert begin + rest == text
    assert begin
    assert len(begin) <= 400


def test_a_text_format_has_no_place_for_tools() -> None:
    template = template_of(byte_tokenizer("</s>"), "alpaca")
    with pytest.raises(RowRefused, match="row 8: the template alpaca has no place for tool calls"):
        template.rows(Example(7, CALLED, tools=(WEATHER,)), "answer")
    # A call that comes after all that is learned is not written.
    messages = (*TURNS, *CALLED)
    [(_, segments)] = template.rows(
        Example(0, (messages[0], Message("assistant", "4", learn=True), *messages[2:])), "flags"
    )
    assert [s.text for s in segments if s.learn] == ["4", "</s>"]


@pytest.mark.parametrize(
    ("template", "reads"),
    [
        ("llama-3.1", {"system", "tools"}),
        ("qwen-3", {"system", "tools", "reasoning"}),
        ("mistral-nemo", {"system", "tools"}),
        ("phi-4", {"system"}),
        ("gemma-2", {"system"}),  # it refuses one, which is no silence
    ],
)
def test_what_of_a_row_a_chat_template_reads(template: str, reads: set[str]) -> None:
    assert ModelChat(tokenizer_of(template)).reads == {"instruction", "input", *reads}


def chat(template: str) -> ModelChat:
    tokenizer = byte_tokenizer("<|im_end|>", None, ("<|im_start|>",))
    tokenizer.chat_template = template
    return ModelChat(tokenizer)


LOOP = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        # Nothing of an answer but its first line.
        (LOOP + "{{ m['content'].split('\n')[0] }}" + END, None, "a part of message 2"),
        # Messages of a role that is not known are passed over.
        (
            LOOP
            + "{% if m['role'] != 'tool' %}{{ m['content'] }}{{ m['tool_calls'] }}{% endif %}"
            + END,
            CALLED,
            "no place for message 3, of the role tool",
        ),
        # Answers are marked, but not tool calls.
        (
            LOOP
            + "{% generation %}{{ m['content'] }}{% endgeneration %}{{ m['tool_calls'] }}"
            + END,
            CALLED,
            "does not mark as the assistant's, a part of message 2",
        ),
        # The prompt holds what the whole does not.
        (LOOP + "{{ m['content'] }}" + END[:-11] + "<think>{% endif %}", None, "'<think>' becomes"),
        # A header that counts the letters of what follows: no prompt can know them.
        (
            "{{ messages[-1]['content']|length }}" + LOOP + "{{ m['content'] }}" + END,
            None,
            "writes a prompt otherwise once its answer follows ('3<|im_start|>",
        ),
        # More messages than there are.
        ("{{ messages[7]['content'].strip() }}", None, "does not take it"),
    ],
)
def test_what_a_template_does_not_write_is_refused_by_row(
    template: str, messages: tuple[Message, ...] | None, reason: str
) -> None:
    answer = Message("assistant", "Four.\nNo, five.")
    example = Example(11, messages or (TURNS[0], answer), tools=(WEATHER,))
    with pytest.raises(RowRefused) as caught:
        chat(template).rows(example, "answer")
    assert reason in str(caught.value)
    assert str(caught.value).startswith("row 12: the model's chat template ")
    assert caught.value.kind == REFUSED


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("qwen-2.5", '{"name": "weather", "arguments": {"city": "Rome"}}'),
        ("llama-3.1", '{"name": "weather", "parameters": {"city": "Rome"}}'),
        ("mistral-nemo", '{"name": "weather", "arguments": {"city": "Rome"}, "id": "'),
    ],
)
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
@pytest.mark.parametrize("number", ["call_8f3kd02kfmvn39", None])
def test_tool_calls_are_written_as_the_template_wants_them(
    name: str, written: str, arguments: Any, number: str | None
) -> None:
    call = {"name": "weather", "arguments": arguments} | ({"id": number} if number else {})
    messages = (
        CALLED[0],
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "31 degrees", tool_call_id=number),
        CALLED[3],
    )
    template = ModelChat(tokenizer_of(name))
    [(_, segments)] = template.rows(Example(0, messages, tools=(WEATHER,)), "answer")
    assert written in "".join(s.text for s in segments if s.learn)
    assert "31 degrees" in "".join(s.text for s in segments if not s.learn)


def test_the_prompt_of_deepseek_r1_as_a_text() -> None:
    """What docs/templates.md gives for models whose own template cuts out what it prompts for."""
    docs = (Path(__file__).parents[1] / "docs" / "templates.md").read_text(encoding="utf-8")
    [stated] = re.findall(r'`data\.template: ("<｜User｜>.*?")`', docs)
    tokenizer = tokenizer_of("deepseek-r1-distill")
    template = template_of(tokenizer, json.loads(stated))
    thoughtful = Message("assistant", "2 and 2.\n</think>\n\nFour.")
    for said in (thoughtful, Message("assistant", "Four.")):
        with pytest.raises(RowRefused, match=r"'<think>\\n' becomes"):
            template_of(tokenizer, "chat").rows(Example(0, (TURNS[0], said)), "answer")
    example = Example(0, (TURNS[0], thoughtful))
    asked = [{"role": "user", "content": TURNS[0].content}]
    own = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert tokenizer.bos_token + template.prompt(example) == own
    segments = template.segments(example, "answer")
    learned = "".join(s.text for s in segments if s.learn)
    assert learned == "2 and 2.\n</think>\n\nFour." + tokenizer.eos_token


def test_a_mark_that_leaves_out_the_end_is_told() -> None:
    assert "learn to stop" in ModelChat(tokenizer_of("chatml-generation")).warnings[0]
    assert not ModelChat(tokenizer_of("lfm-2.5")).warnings


def test_an_instruction_for_all_rows_is_none_for_conversations() -> None:
    template = ModelChat(tokenizer_of("qwen-2.5"), instruction="Answer.")
    with pytest.raises(DataError, match=r"state data\.system in its place"):
        template.rows(Example(0, TURNS), "answer")


def rendered(template: Any, rows: list[Example], loss_on: Any) -> Rendered:
    found = Rendered()
    assert len(list(render(template, rows, loss_on, found))) == len(found.places)
    return found


def test_rows_that_are_refused_are_counted_and_named() -> None:
    template = ModelChat(tokenizer_of("gemma-2"))
    good, bad = Example(0, TURNS), Example(4, (SYSTEM, *TURNS))
    silent = Example(5, (TURNS[0], Message("assistant", " ")))
    rows = [good, bad, silent, good]
    found = rendered(template, rows, "answer")
    assert found.places.tolist() == [0, 3]
    assert {kind: places.tolist() for kind, places in found.kinds().items()} == {REFUSED: [1]}
    [warning] = found.warnings(rows)
    assert warning.startswith("1 of 4 rows are left out, such as row 5: the model's chat template")
    assert "System role not supported" in warning
    with pytest.raises(RowRefused, match=r"row 5: .*System role not supported"):
        rendered(template, [bad, silent], "answer")
    flagged = rendered(
        template, [good, Example(1, (TURNS[0], Message("assistant", "4", learn=True)))], "flags"
    )
    assert list(flagged.kinds()) == [UNLEARNED]
    mistral = rendered(ModelChat(tokenizer_of("mistral-nemo")), [bad, good], "answer")
    assert mistral.places.tolist() == [0, 0, 1]
    parts = Parts(Picked(ExampleStore([bad, good])), mistral, np.arange(3))
    assert [part.turns for part in parts] == [(2,), (4,), None]
    assert [len(part.messages) for part in parts] == [3, 5, len(good.messages)]
    assert mistral.warnings([bad, good])[0].startswith("1 of 2 conversations are trained as 2 rows")


def recipe_of(folder: Path, rows: list[dict[str, Any]], **data: Any) -> Recipe:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Recipe.model_validate(
        {"model": {"name": "x"}, "data": {"path": str(path), "held_out": 1, **data}}
    )


def spoken(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def test_conversations_are_prepared_with_all_their_rows(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen-3")
    rows = [{"messages": spoken(f"{i}?", f"{i}.", f"Not {i}?", f"No, {i}.")} for i in range(6)]
    rows[2]["messages"][3]["weight"] = 0
    rows[4] = {"messages": spoken("4?", "4.")}
    found = prepare(recipe_of(tmp_path, rows), tokenizer, 512)
    # All rows of one conversation stand on one side.
    assert not {row.row for row in found.train} & {row.row for row in found.held_out}
    whole = [*found.train, *found.held_out]
    assert sorted(row.row for row in whole) == [0, 0, 1, 1, 2, 3, 3, 4, 5, 5]
    learned = {tokenizer.decode(row.input_ids[row.loss_mask]) for row in whole}
    expected = {f"{i}." for i in range(6)} | {f"No, {i}." for i in (0, 1, 3, 5)}
    assert learned == {f"<think>\n\n</think>\n\n{said}<|im_end|>\n" for said in expected}
    assert any("4 of 6 conversations are trained as 8 rows" in text for text in found.warnings)
    assert [row.row for row in found.train_rows] == [row.row for row in found.train]


def test_what_a_template_refuses_is_left_out_and_said(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [{"messages": spoken(f"{i}?", f"{i}.")} for i in range(6)]
    rows[3]["messages"].insert(0, system)
    found = prepare(recipe_of(tmp_path, rows), tokenizer_of("gemma-2"), 512)
    assert found.audit.rows_dropped == {"refused by the template": 1}
    assert "refused-rows" in {finding.name for finding in found.findings}
    assert any("1 of 6 rows are left out, such as row 4" in text for text in found.warnings)
    for row in rows:
        row["messages"] = [system, *spoken("?", ".")]
    with pytest.raises(DataError, match=r"row 1: .*System role not supported"):
        prepare(recipe_of(tmp_path, rows), tokenizer_of("gemma-2"), 512)


def test_texts_are_prepared_without_a_template(tmp_path: Path) -> None:
    rows = [{"text": f"{STORY} {i}"} for i in range(4)] + [{"text": " "}]
    found = prepare(recipe_of(tmp_path, rows), tokenizer_of("qwen-2.5"), 512)
    assert found.template.name == "text"
    assert found.audit.rows_dropped == {"empty answer": 1}
    assert all(row.loss_mask[1:].all() for row in found.train)


def test_what_a_template_passes_over_is_told(tmp_path: Path) -> None:
    rows = [{"messages": spoken(f"{i}?", f"{i}.")} for i in range(6)]
    rows[2]["messages"][1]["reasoning_content"] = "Hm."
    for name, told in (("phi-4", 1), ("qwen-3", 0)):
        found = prepare(recipe_of(tmp_path, rows, held_out=0), tokenizer_of(name), 512)
        unused = [finding.text for finding in found.findings if finding.name == "left-out"]
        assert len(unused) == told
        assert all(text.startswith("1 of 6 rows have reasoning") for text in unused)
