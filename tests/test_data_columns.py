"""Which column is which, and cells as text."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from halfbyte.data.columns import find_columns, guess_columns
from halfbyte.data.example import Example
from halfbyte.data.formats.cells import text_of
from halfbyte.data.formats.format import Origin, examples
from halfbyte.data.formats.instruction import Instructions
from halfbyte.data.table import Table
from halfbyte.errors import DataError
from halfbyte.recipe.data_schema import ColumnsRecipe, SourceRecipe

TEXTS = {"short": "a b", "middle": "a longer text", "long": "the longest text of all of them"}


def table(*names: str, text: str = "text") -> Table:
    return Table(list(names), [dict.fromkeys(names, text)])


def found(*names: str, fixed: str | None = None, **columns: str) -> dict[str, str]:
    source = SourceRecipe(path="d.csv", columns=ColumnsRecipe(**columns))
    whole = table(*names)
    return find_columns(source, whole, fixed_instruction=fixed is not None).by_role()


def refused(*names: str, fixed: str | None = None, **columns: str) -> str:
    with pytest.raises(DataError) as caught:
        found(*names, fixed=fixed, **columns)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # The columns of well-known datasets.
        (["instruction", "input", "output", "text"], ["instruction", "input", "output"]),
        (
            ["instruction", "context", "response", "category"],
            ["instruction", "context", "response"],
        ),
        (["id", "Question", "Answer"], ["Question", None, "Answer"]),
        (["prompt", "completion"], ["prompt", None, "completion"]),
        (["query", "response", "type"], ["query", None, "response"]),
        (["problem", "solution"], ["problem", None, "solution"]),
        (["input", "output"], ["input", None, "output"]),
        (["User_Message", "ASSISTANT"], ["User_Message", None, "ASSISTANT"]),
        (["article", "summary"], ["article", None, "summary"]),
        (["output", "question"], ["question", None, "output"]),
    ],
)
def test_columns_by_their_names(names: list[str], expected: list[str | None]) -> None:
    roles = dict(zip(("instruction", "input", "output"), expected, strict=True))
    assert found(*names) == {role: name for role, name in roles.items() if name}
    assert not guess_columns(names, table(*names).rows).by_content


def test_one_instruction_makes_the_question_the_input() -> None:
    both = {"input": "input", "output": "output"}
    assert found("instruction", "input", "output", fixed="Answer.") == both
    assert found("question", "answer", fixed="Answer.") == {"input": "question", "output": "answer"}
    assert found("a", "b", input="a", output="b", fixed="Answer.") == {"input": "a", "output": "b"}


def test_system_messages_have_a_column_of_their_own() -> None:
    open_orca = ("id", "system_prompt", "question", "response")
    expected = {"system": "system_prompt", "instruction": "question", "output": "response"}
    assert found(*open_orca) == expected
    assert found("a", "b", "c", system="a", output="b", instruction="c") == {
        "system": "a",
        "instruction": "c",
        "output": "b",
    }
    # A flag of that name is no message.
    flags = Table(["system", "q", "answer"], [{"system": True, "q": "1", "answer": "2"}])
    assert find_columns(SourceRecipe(path="d.csv"), flags).system is None


def test_named_columns_go_first() -> None:
    names = ("instruction", "input", "output", "better")
    assert found(*names, output="better") == {
        "instruction": "instruction",
        "input": "input",
        "output": "better",
    }
    assert found(*names, instruction="input") == {"instruction": "input", "output": "output"}
    assert found("frage", "kontext", "output", instruction="frage", input="kontext") == {
        "instruction": "frage",
        "input": "kontext",
        "output": "output",
    }
    assert found("frage", "antwort", output="antwort") == {
        "instruction": "frage",
        "output": "antwort",
    }


def test_columns_by_content() -> None:
    rows: list[dict[str, object]] = [{"n": 1, **TEXTS} for _ in range(3)]
    guess = guess_columns(["n", "short", "long", "middle"], rows)
    assert guess.by_role() == {"instruction": "middle", "output": "long"}
    assert guess.by_content
    assert guess.reason == {
        "instruction": "it is the text beside the answer",
        "output": "its texts are the longest",
    }
    # A run is not started on such a guess.
    with pytest.raises(DataError, match=r"state data\.columns\.output, which may be long"):
        find_columns(SourceRecipe(path="d.csv"), Table(["n", *TEXTS], rows))


def test_columns_that_are_not_there() -> None:
    sentence = refused("instruction", "Antwort", "output", output="antwrt")
    assert sentence == (
        "data.columns.output: d.csv has no column antwrt (did you mean Antwort?); it has "
        "instruction, Antwort, output."
    )
    assert "it has a, b." in refused("a", "b", instruction="question")
    assert "holds no messages with a role" in refused("messages")
    assert "holds no messages with a role" in refused("id", "conversations")
    assert "needs a column for the question and one for the answer" in refused("text")
    assert "one column for two roles" in refused("a", "b", instruction="a", output="a")
    assert "leave one of the two out" in refused("a", "b", fixed="Answer.", instruction="a")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        (True, "true"),
        (3, "3"),
        (2.5, "2.5"),
        (Decimal("1.10"), "1.10"),
        (date(2024, 2, 29), "2024-02-29"),
        (" as it is ", " as it is "),
    ],
)
def test_cells_that_are_no_text(value: Any, text: str) -> None:
    assert text_of(value, "a") == text


@pytest.mark.parametrize(("value", "kind"), [([1], "a list"), ({}, "an object"), (b"", "bytes")])
def test_cells_that_are_none(value: Any, kind: str) -> None:
    rows: list[dict[str, object]] = [{"question": "q", "answer": "a"}, {"question": value}]
    columns = guess_columns(["question", "answer"], rows[:1])
    whole = Table(["question", "answer"], rows)
    with pytest.raises(DataError, match=rf"^d\.json, row 2, column question: .* holds {kind} "):
        list(examples(Instructions(columns), whole.rows, Origin("d.json")))
    assert list(examples(Instructions(columns), [{"answer": 1}], Origin("d.json"))) == [
        Example.question_and_answer(0, "", "", "1")
    ]
