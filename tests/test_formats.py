"""What rows are recognised as, and what each format makes of them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data.example import Example, Message
from halfbyte.data.formats.format import Origin, examples
from halfbyte.data.formats.recognise import Recognised, recognise
from halfbyte.data.source import read_rows
from halfbyte.data.table import Table
from halfbyte.errors import DataError
from halfbyte.recipe.data_schema import ColumnsRecipe, JinjaRecipe, SourceRecipe

USER = {"role": "user", "content": "What is 6 times 7?"}
SAID = {"role": "assistant", "content": "42."}
HUMAN = {"from": "human", "value": "What is 6 times 7?"}
GPT = {"from": "gpt", "value": "42."}
CONTENT = st.text(max_size=8)
ASKED = Message("user", "What is 6 times 7?")
ANSWER = Message("assistant", "42.")


def table(rows: list[dict[str, Any]], *, typed: bool = False) -> Table:
    return Table(list(dict.fromkeys(key for row in rows for key in row)), rows, typed=typed)


def recognised(rows: list[dict[str, Any]], **more: Any) -> Recognised:
    named = {"columns", "format", "jinja"}
    columns = ColumnsRecipe(**more.pop("columns", {}))
    source = {key: more.pop(key) for key in list(more) if key in named}
    return recognise(SourceRecipe(path="d.jsonl", columns=columns, **source), table(rows), **more)


def read(
    rows: list[dict[str, Any]], *, typed: bool = False, **more: Any
) -> tuple[list[Example], list[str]]:
    """The rows as examples, and what is told of them together."""
    origin = Origin("d.jsonl", typed=typed)
    made = list(examples(recognised(rows, **more).format, rows, origin))
    return made, origin.warnings(len(rows))


def conversation(*messages: dict[str, Any], **more: Any) -> tuple[Message, ...]:
    [example], told = read([{"messages": list(messages)}], **more)
    assert told == []
    assert (example.row, example.text, example.instruction) == (0, None, None)
    return example.messages


def refused(rows: list[dict[str, Any]], **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(rows, **more)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


# ---- recognising -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "format", "columns"),
    [
        # Rows of well-known datasets.
        (
            {"instruction": "a", "input": "b", "output": "c", "text": "Below is a … b … c"},
            "instruction",
            {"instruction": "instruction", "input": "input", "output": "output"},
        ),
        (
            {"system_prompt": "s", "question": "a", "response": "b", "id": "flan.1"},
            "instruction",
            {"system": "system_prompt", "instruction": "question", "output": "response"},
        ),
        (
            {"prompt": "a", "completion": "b"},
            "prompt_completion",
            {"instruction": "prompt", "output": "completion"},
        ),
        (
            {"prompt": [USER], "completion": [SAID]},
            "prompt_completion",
            {"instruction": "prompt", "output": "completion"},
        ),
        (
            {"system": "s", "question": "a", "chosen": "b", "rejected": "c"},
            "prompt_completion",
            {"system": "system", "instruction": "question", "output": "chosen"},
        ),
        (
            {"chosen": [USER, SAID], "rejected": [USER, {**SAID, "content": "41."}], "score": 1.0},
            "prompt_completion",
            {"output": "chosen"},
        ),
        ({"messages": [USER, SAID]}, "messages", {"messages": "messages"}),
        (
            {"prompt": "a", "prompt_id": "1", "messages": [USER, SAID], "category": "Open QA"},
            "messages",
            {"messages": "messages"},
        ),
        (
            {"messages": json.dumps([USER, SAID]), "tools": "[]"},  # out of a CSV file
            "messages",
            {"messages": "messages", "tools": "tools"},
        ),
        (
            {"id": "1", "conversations": [HUMAN, GPT], "system": "s", "tools": None},
            "sharegpt",
            {"messages": "conversations", "system": "system", "tools": "tools"},
        ),
        ({"conversations": [USER, SAID]}, "messages", {"messages": "conversations"}),
        ({"Talk": [HUMAN, GPT]}, "sharegpt", {"messages": "Talk"}),
        (
            {"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}},
            "sharegpt",
            {"messages": "conversations"},
        ),
        ({"text": "Once upon a time."}, "text", {"text": "text"}),
        (
            {"id": "1", "url": "u", "title": "A", "text": "Once upon a time."},
            "text",
            {"text": "text"},
        ),
        ({"body": "Once upon a time.", "year": 1999}, "text", {"text": "body"}),
    ],
)
def test_rows_of_known_datasets(row: dict[str, Any], format: str, columns: dict[str, str]) -> None:
    found = recognised([row])
    assert (found.format.name, found.format.by_role()) == (format, columns)
    assert found.why
    assert set(found.format.reason) == set(columns)
    # Said by the recipe it is the same, and not chosen for the user.
    stated = recognised([row], format=format, columns=columns)
    assert (stated.format.by_role(), stated.why, stated.warnings) == (columns, None, ())
    assert read([row], format=format, columns=columns) == read([row])


def test_broken_rows_among_others_do_not_hide_the_format() -> None:
    rows = [
        {"messages": None},
        {"messages": []},
        {"messages": "hello"},
        *[{"messages": [USER]}] * 2,
    ]
    assert recognised(rows).format.name == "messages"
    assert "row 3, column messages: a text that is no list of messages." in refused(rows)


@pytest.mark.parametrize(
    ("row", "more", "sentence"),
    [
        (
            {"messages": [USER, SAID], "conversation": [USER, SAID]},
            {},
            "the columns messages, conversation of d.jsonl all hold conversations; state in "
            "data.columns.messages which of them to train.",
        ),
        ({"a": "question", "b": "answer"}, {}, "state data.columns.output, which may be a."),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"},
            {},
            "has a completion, chosen, and no column of what it completes",
        ),
        ({"dialog": ["hi", "hello"]}, {}, "the column dialog holds no messages with a role"),
        ({"label": 1, "idx": 2}, {}, "needs a column for the question and one for the answer"),
        ({"a": "b", "c": "d"}, {"format": "text"}, "state data.columns.text."),
        ({"a": "b"}, {"format": "sharegpt"}, "no column of d.jsonl holds messages (there are a)"),
        ({"a": "b"}, {"format": "prompt_completion"}, "has no completion (there are a)"),
        ({"a": "b"}, {"format": "jinja"}, "the format of d.jsonl is jinja; give data.jinja.user"),
        (
            {"text": "b"},
            {"format": "text", "jinja": JinjaRecipe(text="{{ text }}")},
            "leave data.jinja out or state data.format: jinja.",
        ),
        (
            {"text": "b", "messages": [USER, SAID]},
            {"columns": {"text": "text"}, "format": "messages"},
            "data.columns.text says nothing to rows of the format messages; it takes messages, "
            "tools, system.",
        ),
        ({"text": "b"}, {"fixed_instruction": True, "columns": {"text": "text"}}, "leave it out."),
        (
            {"messages": [USER, SAID]},
            {"columns": {"messages": "mesages"}},
            "data.columns.messages: d.jsonl has no column mesages (did you mean messages?)",
        ),
    ],
)
def test_what_could_ruin_a_run_is_asked_for(
    row: dict[str, Any], more: dict[str, Any], sentence: str
) -> None:
    assert sentence in refused([row], **more)


def test_texts_that_were_rendered_before_are_pointed_out() -> None:
    text = "### Instruction:\nAdd.\n\n### Response:\nDone."
    [warning] = recognised([{"text": text}] * 3).warnings
    assert "holds conversations that are rendered already (in the format of Alpaca)" in warning
    assert recognised([{"text": "### Instruction: is a heading."}]).warnings == ()


# ---- questions and answers, prompts and completions ---------------------------------------------


def test_a_row_s_own_system_message_stands_before_its_answer() -> None:
    rows = [{"system": "Be brief.", "question": "a", "answer": "b"}, {"question": "c"}]
    made, _ = read(rows)
    assert made == [
        Example(0, (Message("system", "Be brief."), Message("assistant", "b")), None, "a", ""),
        Example(1, (Message("assistant", ""),), None, "c", ""),
    ]


def test_prompts_under_one_instruction_are_inputs() -> None:
    made, _ = read([{"prompt": "a", "completion": "b"}], fixed_instruction=True)
    assert made == [Example.question_and_answer(0, "", "a", "b")]


def test_bad_answers_are_left_out_and_told() -> None:
    rows = [{"prompt": "a", "completion": "b", "label": n != 1} for n in range(3)]
    made, told = read(rows)
    assert [example.row for example in made] == [0, 2]
    assert told == [
        "d.jsonl: in 1 of 3 rows label is false: the answer is a bad one, and the row is left out."
    ]
    # One of another kind is not.
    assert len(read([{**row, "label": "b"} for row in rows])[0]) == 3


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is 6 times 7?", "completion": [SAID]},
        {"prompt": [USER], "completion": "42."},
        {"prompt": "What is 6 times 7?", "chosen": [USER, SAID], "rejected": [USER, USER]},
        {"prompt": [USER], "chosen": [USER, SAID], "rejected": [USER]},
        {"prompt": json.dumps([USER]), "completion": json.dumps([SAID])},
    ],
)
def test_prompts_and_completions_of_unlike_kinds(row: dict[str, Any]) -> None:
    [example], _ = read([row])
    assert example.messages == (ASKED, replace(ANSWER, learn=True))


# ---- what was said before, in a column of its own ------------------------------------------------

ALPACA = {"instruction": "And", "input": "times 2?", "output": "84.", "system": "Be brief."}
BEFORE = [["What is 6 times 7?", "42."]]
SPOKEN = (ASKED, ANSWER, Message("user", "And\n\ntimes 2?"), Message("assistant", "84."))
BRIEF = Message("system", "Be brief.")


@pytest.mark.parametrize(
    ("row", "format", "columns"),
    [
        (
            {**ALPACA, "history": BEFORE},
            "instruction",
            {"instruction": "instruction", "input": "input", "output": "output"}
            | {"system": "system", "history": "history"},
        ),
        (
            {"query": "a", "response": "b", "history": []},
            "instruction",
            {"instruction": "query", "output": "response", "history": "history"},
        ),
        (
            {"prompt": "a", "response": "b", "history": json.dumps(BEFORE)},  # out of a CSV file
            "instruction",
            {"instruction": "prompt", "output": "response", "history": "history"},
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "history": BEFORE},
            "prompt_completion",
            {"instruction": "prompt", "output": "chosen", "history": "history"},
        ),
        (
            {"question": "a", "answer": "b", "history": [USER, SAID]},
            "instruction",
            {"instruction": "question", "output": "answer", "history": "history"},
        ),
        # A patient's history is a text, and a lone column of messages a conversation.
        (
            {"question": "a", "history": "Had measles.", "answer": "b"},
            "instruction",
            {"instruction": "question", "output": "answer"},
        ),
        ({"id": "1", "history": [USER, SAID]}, "messages", {"messages": "history"}),
    ],
)
def test_a_column_of_what_was_said_before(
    row: dict[str, Any], format: str, columns: dict[str, str]
) -> None:
    found = recognised([row])
    assert (found.format.name, found.format.by_role()) == (format, columns)
    assert set(found.format.reason) == set(columns)
    assert read([row], format=format, columns=columns) == read([row])


@pytest.mark.parametrize("history", [BEFORE, json.dumps(BEFORE), [tuple(BEFORE[0])], [USER, SAID]])
def test_a_history_and_its_question_are_a_conversation(history: Any) -> None:
    rows = [{**ALPACA, "history": history}, {**ALPACA, "system": "", "history": []}, ALPACA]
    made, told = read(rows)
    assert told == []
    assert made == [
        Example(0, (BRIEF, *SPOKEN)),
        Example.question_and_answer(1, "And", "times 2?", "84."),
        Example(2, (BRIEF, SPOKEN[-1]), instruction="And", input="times 2?"),
    ]


def test_only_the_completion_is_learned_behind_a_history() -> None:
    row = {"prompt": "And?", "completion": "84.", "history": BEFORE}
    [example], _ = read([row])
    flags = [message.learn for message in example.messages]
    assert flags == [None, False, None, True]
    assert [message.content for message in example.messages[2:]] == ["And?", "84."]


def test_histories_in_parquet_are_those_in_json(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{**ALPACA, "history": BEFORE * n} for n in (0, 2, 1)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    source = SourceRecipe(path=str(tmp_path / "rows.parquet"))
    stored = read_rows(source)
    origin = Origin(source.path, typed=stored.typed)
    assert list(examples(recognise(source, stored).format, stored.rows, origin)) == read(rows)[0]


@settings(max_examples=60, deadline=None)
@given(
    history=st.lists(st.tuples(CONTENT, CONTENT).map(list), max_size=3),
    row=st.fixed_dictionaries(
        {"instruction": CONTENT, "input": CONTENT, "output": CONTENT, "system": CONTENT}
    ),
)
def test_a_history_is_the_conversation_that_it_tells(
    history: list[list[str]], row: dict[str, str]
) -> None:
    """The same as the messages that somebody would write out by hand."""
    spoken = [{"role": "system", "content": row["system"]}] if row["system"].strip() else []
    for asked, answered in history:
        spoken += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    question = [part for part in (row["instruction"], row["input"]) if part]
    spoken.append({"role": "user", "content": "\n\n".join(question)})
    spoken.append({"role": "assistant", "content": row["output"]})
    found, _ = read([{**row, "history": history}, {**ALPACA, "history": []}])
    if history:
        assert found[0] == read([{"messages": spoken}])[0][0]
    else:
        assert found[0] == read([row])[0][0]


@pytest.mark.parametrize(
    ("history", "sentence"),
    [
        ("[['a', 'b']]", "a text that is no list of earlier questions and answers."),
        ({"a": "b"}, "an object that is no list of earlier questions and answers."),
        (7, "a number that is no list"),
        (["a", "b"], "pair 1 is a text and no list of a question and its answer."),
        ([["a", "b"], ["c"]], "pair 2 has 1 entry where there are two, a question and its answer."),
        ([["a", "b", "c"]], "pair 1 has 3 entries where"),
        ([["a", None]], "pair 1 has no answer."),
        ([[["a"], "b"]], "history, pair 1: the cell holds a list where a text is needed"),
        ([["a", "b"], USER], "pair 2 is an object and no list"),
        ([USER, {"role": "critic", "content": ""}], "message 2 has the role 'critic'"),
        ([USER], "messages 2 and 3 are both the user's; state data.merge_turns: true"),
        ([{"role": "system", "content": "Be long."}, USER, SAID], "there is a system message in a"),
    ],
)
def test_a_broken_history_is_refused_with_its_row(history: Any, sentence: str) -> None:
    rows = [{**ALPACA, "history": BEFORE}, {**ALPACA, "history": history}]
    told = refused(rows)
    assert told.startswith("d.jsonl, row 2, ")
    assert sentence in told


def test_a_history_that_nothing_reads_is_refused_where_the_recipe_names_it() -> None:
    row = {"prompt": [USER], "completion": [SAID], "history": BEFORE}
    assert "history" not in recognised([row]).format.by_role()
    columns = {"instruction": "prompt", "output": "completion", "history": "history"}
    assert "are conversations already" in refused([row], columns=columns)
    named = {"columns": {"history": "history"}, "format": "messages"}
    told = refused([{"messages": [USER, SAID], "history": BEFORE}], **named)
    assert "data.columns.history says nothing to rows of the format messages" in told


# ---- messages ----------------------------------------------------------------------------------

CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "multiply", "arguments": '{"a": 6, "b": 7}'},
}
CALLED = {"id": "call_1", "name": "multiply", "arguments": {"a": 6, "b": 7}}
SCHEMA = {
    "type": "function",
    "function": {
        "name": "multiply",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def test_a_conversation_with_tools() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "Use tools."},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "42"},
            {"role": "assistant", "content": [{"type": "text", "text": "It is 42."}]},
        ],
        "tools": [SCHEMA],
    }
    expected = Example(
        0,
        (
            Message("system", "Use tools."),
            ASKED,
            Message("assistant", "", tool_calls=(CALLED,)),
            Message("tool", "42", tool_call_id="call_1", name="multiply"),
            Message("assistant", "It is 42."),
        ),
        tools=(SCHEMA,),
    )
    assert read([row]) == ([expected], [])
    for tools in (json.dumps([SCHEMA]), [json.dumps(SCHEMA)], json.dumps(SCHEMA)):
        assert read([{**row, "tools": tools}]) == ([expected], [])
    assert read([{**row, "tools": None}])[0] == [replace(expected, tools=())]


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ('{"a": {"b": null}}', {"a": {"b": None}}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
        ("6 and 7", "6 and 7"),
        ('{"a": ', '{"a": '),
        ("[1]", "[1]"),
    ],
)
def test_arguments_of_a_call(arguments: Any, kept: Any) -> None:
    for call in (
        {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]},
        {"tool_calls": [{"name": "f", "arguments": arguments}]},
        {"function_call": {"name": "f", "arguments": arguments}},
        {"tool_calls": json.dumps([{"name": "f", "arguments": arguments}])},
    ):
        said = conversation(USER, {"role": "assistant", "content": "", **call})
        assert said[1].tool_calls == ({"name": "f", "arguments": kept},)


def test_calls_of_sharegpt() -> None:
    [example], _ = read(
        [
            {
                "conversations": [
                    {"from": "human", "value": "6 times 7?"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 6}}'},
                    {"from": "observation", "value": '{"is": 42}'},
                    {"from": "gpt", "value": "42."},
                ],
                "tools": "",
            }
        ]
    )
    assert example.messages == (
        Message("user", "6 times 7?"),
        Message("assistant", "", tool_calls=({"name": "f", "arguments": {"a": 6}},)),
        Message("tool", '{"is": 42}'),
        ANSWER,
    )


def test_parquet_gives_each_object_the_keys_of_all(tmp_path: Path) -> None:
    from datasets import Dataset

    def row(name: str, **arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        schema = {"type": "function", "function": {"name": name, "parameters": {name: {}}}}
        schema["function"]["parameters"] = {key: {"type": "x"} for key in arguments}
        return {
            "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}],
            "tools": [schema],
        }

    rows = [row("walk", metres=5), row("say", words="hello", loud=False)]
    path = tmp_path / "rows.parquet"
    Dataset.from_list(rows).to_parquet(path)
    source = SourceRecipe(path=str(path))
    stored = read_rows(source)
    assert stored.rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "loud": None,
        "metres": 5,
        "words": None,
    }
    origin = Origin(str(path), typed=stored.typed)
    found = list(examples(recognise(source, stored).format, stored.rows, origin))
    assert found == read(rows)[0]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning(key: str) -> None:
    thought = {**SAID, key: "6 times 7 is 6 + 36."}
    assert conversation(USER, thought)[1] == replace(ANSWER, reasoning="6 times 7 is 6 + 36.")
    assert conversation(USER, {**SAID, key: None})[1] == ANSWER
    assert conversation({**USER, key: "x"}, SAID)[0] == ASKED
    parts = {"role": "assistant", "content": [{"type": key.split("_")[0], "text": "Hm."}, "42."]}
    assert conversation(USER, parts)[1] == replace(ANSWER, reasoning="Hm.")
    # What a content itself holds is left as it is.
    inside = "<think>\nHm.\n</think>\n\n42."
    assert conversation(USER, {**SAID, "content": inside})[1] == Message("assistant", inside)


@pytest.mark.parametrize(
    ("flags", "learn"),
    [
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"weight": None}, None),
        ({"train": False}, False),
        ({"train": True, "weight": 1}, True),
        ({"learn": True}, True),
    ],
)
def test_a_message_s_own_word_on_whether_it_is_learned(
    flags: dict[str, Any], learn: bool | None
) -> None:
    assert conversation(USER, {**SAID, **flags})[1].learn is learn
    [example], told = read([{"messages": [{**USER, **flags}, SAID]}])
    assert example.messages == (ASKED, ANSWER)
    assert bool(told) == bool(learn)  # nothing but an assistant's message is learned


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        (["hi"], "message 1 is a text and not an object."),
        ([{"content": "hi"}], "message 1 does not say who speaks; it has content."),
        ([USER, {"role": "critic", "content": ""}], "message 2 has the role 'critic', which is"),
        ([USER, {"role": "assistant"}], "message 2 has no content."),
        ([USER, {"role": "assistant", "content": 7}], "message 2 has a content that is a number"),
        ([USER, {**SAID, "weight": 0.5}], "message 2 has the weight 0.5, which is neither 1 nor 0"),
        ([USER, {**SAID, "weight": 0, "train": True}], "both to learn it and not to."),
        ([USER, {**SAID, "tool_calls": [{"id": "1"}]}], "a tool call without a function's name."),
        ([{**USER, "tool_calls": [CALL]}, SAID], "message 1 calls a tool, and only an assistant"),
        (
            [USER, {**SAID, "tool_calls": [{"type": "code_interpreter"}]}],
            "message 2 calls a tool of the type code_interpreter, and only functions are read.",
        ),
        ([{"from": "function_call", "value": "multiply it"}], "a tool call that is a text"),
        ([USER, {**SAID, "reasoning": ["Hm."]}], "has reasoning that is a list and not a text."),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, SAID],
            "message 1 has a part of the type image_url, and only text is trained.",
        ),
        ([{**USER, "images": ["x.png"]}, SAID], "message 1 has images, which is not read"),
        ([USER, USER, SAID], "messages 1 and 2 are both the user's; state data.merge_turns: true"),
        ([USER, SAID, SAID], "messages 2 and 3 are both the assistant's; state"),
        ({"a": 1}, "an object that is no list of messages."),
    ],
)
def test_a_broken_conversation_is_refused_with_its_row(messages: Any, sentence: str) -> None:
    rows = [{"messages": [USER, SAID]}, {"messages": messages}]
    told = refused(rows, columns={"messages": "messages"})
    assert told.startswith("d.jsonl, row 2, ")
    assert sentence in told


def test_a_row_is_named_in_its_own_file() -> None:
    origin = Origin("*.jsonl", files=[(0, "a.jsonl"), (3, "b.jsonl")])
    assert [origin.at(row) for row in (0, 2, 3, 9)] == [
        "a.jsonl, row 1",
        "a.jsonl, row 3",
        "b.jsonl, row 1",
        "b.jsonl, row 7",
    ]


def test_turns_of_one_side_are_joined_where_the_recipe_says_so() -> None:
    more = {**SAID, "content": "Or 43.", "tool_calls": [CALL]}
    said = conversation(USER, {**USER, "content": "And?"}, SAID, more, merge_turns=True)
    assert said == (
        Message("user", "What is 6 times 7?\n\nAnd?"),
        Message("assistant", "42.\n\nOr 43.", tool_calls=(CALLED,)),
    )
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    assert len(conversation(USER, {**SAID, "tool_calls": [CALL]}, *results, SAID)) == 5
    rows = [{"messages": [USER, {**SAID, "weight": 0}, SAID]}]
    assert "only one of them is to be learned" in refused(rows, merge_turns=True)


def test_what_nothing_answers_is_left_out_and_told() -> None:
    rows = [
        {"messages": [USER, SAID]},
        {"messages": [USER, SAID, USER]},
        {"messages": [USER, {**SAID, "tool_calls": [CALL]}, {"role": "tool", "content": "42"}]},
        {"messages": [USER]},
        {"messages": []},
        {"messages": [SAID, USER, SAID]},
    ]
    made, told = read(rows)
    assert [len(example.messages) for example in made] == [2, 2, 2, 1, 0, 3]
    assert [example.row for example in made] == list(range(6))
    assert told == [
        "d.jsonl: in 2 of 6 rows what follows the assistant's last message is left out: nothing "
        "answers it.",
        "d.jsonl: in 1 of 6 rows the conversation holds no message of an assistant, so that "
        "nothing can be learned.",
    ]


def test_a_system_message_in_a_column_of_its_own() -> None:
    row = {"conversations": [HUMAN, GPT], "system": "Be brief."}
    spoken = {"from": "system", "value": "Be brief."}
    system = Message("system", "Be brief.")
    assert read([row])[0][0].messages == (system, ASKED, ANSWER)
    assert read([{**row, "conversations": [spoken, HUMAN, GPT]}])[0][0].messages[0] == system
    assert read([{**row, "system": None}, row])[0][0].messages == (ASKED, ANSWER)
    other = {**row, "conversations": [{**spoken, "value": "Be long."}, HUMAN, GPT]}
    assert "d.jsonl, row 2, there is a system message in a column" in refused([row, other])


# ---- against TRL -------------------------------------------------------------------------------


@st.composite
def turns(draw: st.DrawFn, first: str = "user", least: int = 1) -> list[dict[str, Any]]:
    """Messages of two sides by turns, beginning with ``first``, some with a system message."""
    order = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    texts = draw(st.lists(CONTENT, min_size=least, max_size=6))
    spoken = [{"role": order[i % 2], "content": text} for i, text in enumerate(texts)]
    if first == "user" and draw(st.booleans()):
        spoken.insert(0, {"role": "system", "content": draw(CONTENT)})
    return spoken


def up_to_an_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the last message of an assistant ends; all of it where there is none."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    return messages if last is None else messages[: last + 1]


def plain(example: Example) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.content} for m in example.messages]


@settings(max_examples=60, deadline=None)
@given(turns())
def test_sharegpt_is_what_trl_makes_of_it(messages: list[dict[str, Any]]) -> None:
    from trl.data_utils import maybe_convert_to_chatml

    theirs = [{"from": m["role"], "value": m["content"]} for m in messages]
    converted = maybe_convert_to_chatml({"conversations": copy.deepcopy(theirs)})
    [example], _ = read([{"conversations": theirs}])
    assert plain(example) == up_to_an_answer(converted["messages"])
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    other = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    assert read([{"conversations": other}])[0] == [example]


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.one_of(CONTENT, turns().filter(lambda m: m[-1]["role"] != "assistant")),
    completion=st.one_of(CONTENT, turns("assistant")),
)
def test_prompts_and_completions_are_what_trl_makes_of_them(
    prompt: str | list[dict[str, Any]], completion: str | list[dict[str, Any]]
) -> None:
    """Of conversations, all of what completes the prompt is learned, and nothing before it."""
    from trl.data_utils import is_conversational

    if isinstance(prompt, str) != isinstance(completion, str):
        return  # which TRL does not take
    row = {"prompt": prompt, "completion": completion}
    [example], _ = read([row])
    assert (example.instruction is None) == is_conversational(row)
    if isinstance(prompt, str):
        assert example == Example.question_and_answer(0, prompt, "", str(completion))
        return
    whole = up_to_an_answer([*prompt, *completion])
    assert plain(example) == whole
    learned = [i for i, message in enumerate(example.messages) if message.learn]
    assert learned == [
        i for i, m in enumerate(whole) if i >= len(prompt) and m["role"] == "assistant"
    ]


@settings(max_examples=60, deadline=None)
@given(before=turns(), data=st.data())
def test_where_a_preference_parts_is_where_trl_sees_it(
    before: list[dict[str, Any]], data: st.DataObject
) -> None:
    from trl.data_utils import extract_prompt

    following = "user" if before[-1]["role"] == "assistant" else "assistant"
    chosen, rejected = (before + data.draw(turns(following)) for _ in range(2))
    chosen, rejected = (
        [m for i, m in enumerate(side) if i == 0 or m["role"] != "system"]
        for side in (chosen, rejected)
    )
    row = {"chosen": chosen, "rejected": rejected}
    [example], _ = read([row])
    prompt = extract_prompt(copy.deepcopy(row))["prompt"]
    assert plain(example) == up_to_an_answer(chosen)
    for i, message in enumerate(example.messages):
        if message.role == "assistant":
            assert message.learn is (i >= len(prompt))


# ---- any rows ----------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "from",
                    "value",
                    "type",
                    "text",
                    "tool_calls",
                    "function",
                    "name",
                    "id",
                    "arguments",
                    "weight",
                    "reasoning",
                    "tool_call_id",
                    "function_call",
                ]
            )
            | st.text(max_size=3),
            inner | st.sampled_from(["user", "assistant", "tool", "gpt", "function_call", "text"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)
COLUMNS = st.sampled_from(
    [
        "messages",
        "conversations",
        "prompt",
        "completion",
        "chosen",
        "rejected",
        "label",
        "tools",
        "system",
        "history",
        "text",
        "instruction",
        "input",
        "output",
    ]
)
CELLS = VALUES | VALUES.map(lambda value: json.dumps(value, default=str))


@settings(max_examples=400, deadline=None)
@given(
    rows=st.lists(st.dictionaries(COLUMNS, CELLS, min_size=1), min_size=1, max_size=4),
    format=st.sampled_from(["auto", "messages", "prompt_completion", "text", "instruction"]),
    more=st.fixed_dictionaries({"merge_turns": st.booleans(), "fixed_instruction": st.booleans()}),
    typed=st.booleans(),
)
def test_any_rows_are_read_or_refused_in_one_sentence(
    rows: list[dict[str, Any]], format: Any, more: dict[str, bool], typed: bool
) -> None:
    before = copy.deepcopy(rows)
    try:
        made, told = read(rows, typed=typed, format=format, **more)
    except DataError as error:
        sentence = str(error)
        assert sentence.endswith((".", "?"))
    else:
        assert all(example.text is not None or example.messages is not None for example in made)
        for example in made:
            said = [message.content for message in example.messages]
            assert all(isinstance(text, str) for text in said)
            assert [example.row] == [e.row for e in made if e.row == example.row]
        assert len(told) <= 4
    assert repr(rows) == repr(before)  # not equal: NaN is not itself


# ---- texts and templates ------------------------------------------------------------------------


def test_texts() -> None:
    made, _ = read([{"text": "Once.", "n": 1}, {"text": None}, {"text": "Twice.\n"}])
    assert [(e.row, e.text, e.messages) for e in made] == [
        (0, "Once.", ()),
        (1, "", ()),
        (2, "Twice.\n", ()),
    ]
    assert "row 2, column text: the cell holds a list where a text is needed" in refused(
        [{"text": "a"}, {"text": ["b"]}], columns={"text": "text"}
    )


def test_rows_through_a_template() -> None:
    jinja = JinjaRecipe(
        system="{% if hint %}{{ hint }}{% endif %}",
        user="{{ row['the question'] }}\n"
        "{% for c in choices %}{{ loop.index }}. {{ c }}\n{% endfor %}",
        assistant="{{ choices[right] }}",
    )
    rows = [
        {"the question": "Which?", "choices": ["a", "é"], "right": 1, "hint": "Think."},
        {"the question": None, "choices": ["b"], "right": 0},
    ]
    made, told = read(rows, jinja=jinja)
    assert told == []
    system, answer = Message("system", "Think."), Message("assistant", "é")
    assert made == [
        Example(0, (system, answer), None, "Which?\n1. a\n2. é\n", ""),
        Example(1, (Message("assistant", "b"),), None, "\n1. b\n", ""),
    ]
    assert recognised(rows, jinja=jinja).why == "data.jinja makes the rows"
    whole = recognised(rows, jinja=JinjaRecipe(text="{{ row|length }}"))
    assert whole.texts
    assert [e.text for e in examples(whole.format, rows, Origin("d"))] == ["4", "4"]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ titel }}", "row 1, data.jinja.text: 'titel' is undefined (did you mean title?); the"),
        ("{{ title.upper.x }}", "row 1, data.jinja.text: "),
        ("{{ title + 1 }}", "row 1, data.jinja.text cannot be rendered: can only concatenate"),
        ("{{ ().__class__.__mro__ }}", "row 1, data.jinja.text"),
        ("{{ tags.append('x') }}", "row 1, data.jinja.text cannot be rendered"),
        ("{% for a in b %}", "data.jinja.text, line 1: this is no Jinja template ("),
        ("{{ title }", "data.jinja.text, line 1: this is no Jinja template ("),
    ],
)
def test_a_template_that_does_not_fit(template: str, sentence: str) -> None:
    rows = [{"title": "A", "tags": ["b"]}]
    assert sentence in refused(rows, jinja=JinjaRecipe(text=template))
    assert rows == [{"title": "A", "tags": ["b"]}]
