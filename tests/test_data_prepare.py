"""From a recipe to rows of tokens: limit, split, cut, audit, warnings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halfbyte.data.example import Example
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.errors import DataError
from halfbyte.recipe import Recipe

MODEL_LENGTH = 256


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def row(number: int, answer: str | None = None) -> dict[str, str]:
    answer = f"It is {number}." if answer is None else answer
    return {"instruction": f"Say {number}.", "input": "", "output": answer}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def recipe(path: Path, *, seed: int = 42, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": {"name": "tiny"}, "seed": seed, "data": {"path": str(path), **data}}
    )


def prepared(
    tokenizer: Any, folder: Path, rows: Sequence[dict[str, Any]], *, seed: int = 42, **data: Any
) -> Prepared:
    path = write(folder / "rows.jsonl", rows)
    return prepare(recipe(path, seed=seed, **data), tokenizer, MODEL_LENGTH)


def numbers(rows: Sequence[Any]) -> list[int]:
    return [row.row for row in rows]


def choice(found: Prepared, key: str) -> Any:
    [event] = [event for event in found.choices if event.key == key]
    return event


def test_the_audit_counts_what_a_loop_over_tokens_counts(tokenizer: Any, tmp_path: Path) -> None:
    rows = [row(n) for n in range(40)]
    rows[3]["output"], rows[7]["output"] = "", " \n"
    rows[11] = row(11, "long " * 30)
    rows[12]["instruction"] = "x" * 120  # its answer is cut off whole
    found = prepared(tokenizer, tmp_path, rows, max_length=100)
    audit = found.audit
    assert audit.rows_dropped == {"empty answer": 2, "nothing to learn after cutting": 1}
    assert (audit.rows_read, audit.rows_held_out) == (40, 1)
    assert audit.rows_used + audit.rows_held_out + sum(audit.rows_dropped.values()) == 40
    assert numbers([*found.train, *found.held_out]) != list(range(40))
    assert set(numbers([*found.train, *found.held_out])) == set(range(40)) - {3, 7, 12}
    assert found.held_out_rows == [
        Example.question_and_answer(n, *rows[n].values()) for n in numbers(found.held_out)
    ]
    whole = {
        n: tokenizer.apply_chat_template(
            [
                {"role": "user", "content": rows[n]["instruction"]},
                {"role": "assistant", "content": rows[n]["output"]},
            ],
            return_dict=False,
        )
        for n in numbers(found.train)
    }
    prompt = {
        n: tokenizer.apply_chat_template(
            [{"role": "user", "content": rows[n]["instruction"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for n in numbers(found.train)
    }
    for one in found.train:
        assert one.input_ids.tolist() == whole[one.row][:100]
        assert one.loss_mask.tolist() == [
            at >= len(prompt[one.row]) for at in range(len(whole[one.row][:100]))
        ]
    lengths = sorted(map(len, whole.values()))
    assert audit.length_percentiles == {
        "0": lengths[0],
        "50": lengths[-(-len(lengths) // 2) - 1],
        "90": lengths[-(-len(lengths) * 9 // 10) - 1],
        "99": lengths[-1],
        "100": lengths[-1],
    }
    assert audit.rows_shortened == sum(n > 100 for n in lengths) == 1
    assert audit.tokens == sum(min(n, 100) for n in lengths)
    assert audit.labels == sum(min(len(whole[n]), 100) - len(prompt[n]) for n in whole)
    assert audit.template == "chat"
    assert audit.columns == {"instruction": "instruction", "input": "input", "output": "output"}


def test_the_sample_is_what_the_model_sees(tokenizer: Any, tmp_path: Path) -> None:
    rows = [row(1, "字 and 👩‍🚀.")]
    whole = "<|im_start|>user\nSay 1.<|im_end|>\n<|im_start|>assistant\n"
    found = prepared(tokenizer, tmp_path, rows)
    assert found.audit.sample == [(whole, False), ("字 and 👩‍🚀.<|im_end|>\n", True)]
    [one] = found.train
    assert tokenizer.decode(one.input_ids) == "".join(text for text, _ in found.audit.sample)
    everything = prepared(tokenizer, tmp_path, rows, loss_on="all")
    assert everything.audit.labels == everything.audit.tokens - 1
    first, rest = everything.audit.sample
    assert first == ("<|im_start|>", False)
    assert rest[1]
    # Cut in the middle of an answer, and of a character.
    for length in range(len(one) - one.num_labels + 1, len(one)):
        short = prepared(tokenizer, tmp_path, rows, max_length=length)
        text = "".join(text for text, _ in short.audit.sample)
        assert text.encode().startswith(
            tokenizer.decode(short.train[0].input_ids).rstrip("\ufffd").encode()
        )
        assert (whole + "字 and 👩‍🚀.<|im_end|>\n").startswith(text)


@pytest.mark.parametrize("answer", ["One.", "", " "])
def test_rows_without_an_answer_are_dropped_and_the_last_is_an_error(
    tokenizer: Any, tmp_path: Path, answer: str
) -> None:
    if answer.strip():
        assert len(prepared(tokenizer, tmp_path, [row(1, answer)]).train) == 1
        return
    with pytest.raises(DataError) as caught:
        prepared(tokenizer, tmp_path, [row(1, answer), row(2, "")], held_out=1)
    assert str(caught.value) == (
        f"{tmp_path / 'rows.jsonl'} leaves no row to train: 2 of 2 rows have an empty answer; "
        "look whether data.columns.output names the column of the answers."
    )


def test_prompts_over_the_maximum_length_leave_nothing(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing to learn after cutting; raise data\.max_length"):
        prepared(tokenizer, tmp_path, [row(n) for n in range(3)], max_length=8)


# ---- the split ----------------------------------------------------------------------------------


def test_rows_held_out_by_the_seed(tokenizer: Any, tmp_path: Path) -> None:
    rows = [row(n) for n in range(100)]
    found = prepared(tokenizer, tmp_path, rows)
    assert (len(found.train), len(found.held_out)) == (95, 5)
    assert choice(found, "data.held_out").value == 5
    assert sorted(numbers([*found.train, *found.held_out])) == list(range(100))
    again = prepared(tokenizer, tmp_path, rows)
    other = prepared(tokenizer, tmp_path, rows, seed=43)
    assert numbers(again.held_out) == numbers(found.held_out) != numbers(other.held_out)
    assert len(prepared(tokenizer, tmp_path, rows, held_out=0).held_out) == 0
    assert len(prepared(tokenizer, tmp_path, rows[:19]).held_out) == 0
    assert len(prepared(tokenizer, tmp_path, rows[:20]).held_out) == 1
    assert len(prepared(tokenizer, tmp_path, [row(n) for n in range(4500)]).held_out) == 200
    with pytest.raises(DataError, match="none would train"):
        prepared(tokenizer, tmp_path, rows[:10], held_out=10)


def test_rows_held_out_after_the_limit(tokenizer: Any, tmp_path: Path) -> None:
    rows = [row(n) for n in range(60)]
    rows[33]["output"] = ""
    after = {"held_out_from": "after", "held_out": 10}
    found = prepared(tokenizer, tmp_path, rows, limit=30, **after)
    assert numbers(found.train) == list(range(30))
    assert numbers(found.held_out) == [30, 31, 32, 34, 35, 36, 37, 38, 39, 40]
    assert (found.audit.rows_read, found.audit.rows_dropped) == (41, {"empty answer": 1})
    last = prepared(tokenizer, tmp_path, rows, **after)
    assert (numbers(last.train)[-1], numbers(last.held_out)) == (49, list(range(50, 60)))
    few = prepared(tokenizer, tmp_path, rows, limit=55, **after)
    assert numbers(few.held_out) == list(range(55, 60))
    assert "asks for 10 rows and only 5 are there" in few.warnings[0]
    auto = prepared(tokenizer, tmp_path, rows, limit=40, held_out_from="after")
    assert numbers(auto.held_out) == [40, 41]
    with pytest.raises(DataError, match="so that none follows"):
        prepared(tokenizer, tmp_path, rows, limit=60, **after)


def test_rows_held_out_from_a_file_of_their_own(tokenizer: Any, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [row(n) for n in range(300)])
    rows = [row(n) for n in range(1000, 1030)]
    found = prepared(tokenizer, tmp_path, rows, held_out_path=str(other))
    assert (len(found.train), numbers(found.held_out)) == (30, list(range(200)))
    assert found.held_out_rows[5] == Example.question_and_answer(5, *row(5).values(), source=1)
    three = prepared(tokenizer, tmp_path, rows, held_out_path=str(other), held_out=3, limit=20)
    assert (len(three.train), numbers(three.held_out)) == (20, [0, 1, 2])
    with pytest.raises(DataError, match="there is no data file"):
        prepared(tokenizer, tmp_path, rows, held_out_path=str(tmp_path / "no.jsonl"))


@pytest.mark.parametrize("source", ["random", "after", "file"])
def test_the_effective_recipe_gives_the_same_rows(
    tokenizer: Any, tmp_path: Path, source: str
) -> None:
    """With what was decided now stated, as a run is resumed."""
    rows = [row(n, "x" * (n % 23)) for n in range(200)]
    rows[50]["instruction"] = "y" * 400
    data: dict[str, Any] = {"limit": 150} if source == "after" else {}
    if source != "file":
        data["held_out_from"] = source
    else:
        data["held_out_path"] = str(write(tmp_path / "other.jsonl", rows[:60]))
    first = prepared(tokenizer, tmp_path, rows, **data)
    assert first.held_out
    stated = {"held_out": len(first.held_out), "max_length": first.max_length, "template": "chat"}
    again = prepared(tokenizer, tmp_path, rows, **data, **stated)
    for one, other in ((first.train, again.train), (first.held_out, again.held_out)):
        assert numbers(one) == numbers(other)
        assert [r.input_ids.tolist() for r in one] == [r.input_ids.tolist() for r in other]


# ---- lengths ------------------------------------------------------------------------------------


def test_the_maximum_length_is_the_99th_percentile(tokenizer: Any, tmp_path: Path) -> None:
    rows = [row(n, "x" * (n + 1)) for n in range(100)]
    found = prepared(tokenizer, tmp_path, rows, held_out=0)
    lengths = sorted(len(one) + one.cut for one in found.train)
    assert found.max_length == lengths[98] == lengths[99] - 1
    assert found.audit.rows_shortened == 1
    assert "99 % of the rows fit whole" in choice(found, "data.max_length").reason
    long = prepared(tokenizer, tmp_path, [row(n, "字" * 200) for n in range(9)])
    assert long.max_length == MODEL_LENGTH
    assert "the model takes no more" in choice(long, "data.max_length").reason
    stated = prepared(tokenizer, tmp_path, rows, max_length=300)
    assert stated.max_length == 300
    assert "the model was made for 256" in stated.warnings[0]


# ---- warnings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "data", "sentence"),
    [
        ([row(1, "x " * 60)] * 3 + [row(n) for n in range(9)], {"max_length": 80}, "lose the end"),
        ([row(n % 50) for n in range(100)], {}, "held-out rows are also among the rows that train"),
        ([row(n % 10) for n in range(30)], {"held_out": 0}, "20 of 30 rows that train are copies"),
        ([row(1, "a<|im_end|>b"), row(2)], {}, "1 of 2 rows hold the text of a special token"),
        ([row(1) | {"instruction": ""}, row(2)], {}, "1 of 2 rows have an answer and no question"),
        (
            [row(1) | {"input": "2"}, row(2)],
            {"template": "{instruction}\n{output}"},
            "1 of 2 rows have an input, for which the template has no place",
        ),
        (
            # " It" is a token of this tokenizer, so the space goes with the answer.
            [row(n, "number one") for n in range(9)],
            {"template": "{instruction}\nAnswer: {output}"},
            "in 9 of 9 rows looked at the end of the prompt and the start of the answer",
        ),
    ],
)
def test_what_the_user_may_not_expect_is_said(
    tokenizer: Any, tmp_path: Path, rows: list[Any], data: dict[str, Any], sentence: str
) -> None:
    findings = prepared(tokenizer, tmp_path, rows, **data).findings
    assert sentence in " ".join(finding.sentence for finding in findings)


def test_ordinary_rows_get_no_warning(tokenizer: Any, tiny_rows: Path) -> None:
    for template in ("chat", "alpaca", "plain"):
        found = prepare(recipe(tiny_rows, template=template), tokenizer, MODEL_LENGTH)
        assert found.warnings == []
        few_and_foreign = {"few-rows"} if template == "chat" else {"few-rows", "foreign-template"}
        assert {finding.name for finding in found.findings} == few_and_foreign
        assert (len(found.train), len(found.held_out)) == (23, 1)
        assert found.template.question(found.held_out_rows[0]).startswith("Say the number")


def test_a_first_file_of_500_rows_reads_no_further(tokenizer: Any, tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row(n)) for n in range(30)) + "\nthis is no row"
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    found = prepare(recipe(tmp_path / "rows.jsonl", limit=30), tokenizer, MODEL_LENGTH)
    assert found.audit.rows_read == 30
