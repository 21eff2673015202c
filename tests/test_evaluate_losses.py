"""Losses and likelihoods of an evaluation, against PEFT's logits in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("peft")

from evaluate_case import Oracle, train_run, write_lines
from halfbyte.data.template import make_template
from halfbyte.errors import DataError
from halfbyte.evaluate import row_losses as module
from halfbyte.evaluate.row_losses import RowLosses, row_losses
from halfbyte.finished.choices import Question, choice_rows, likelihoods, read_questions
from halfbyte.finished.opened import OpenedAdapter, open_adapter
from halfbyte.finished.rows import HeldOut, held_out_rows
from halfbyte.recipe.data_schema import DataRecipe


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def opened(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    tiny_rows: Path,
) -> OpenedAdapter:
    folder = tmp_path_factory.mktemp("losses")
    return open_adapter(train_run(folder, tiny_model, tiny_rows), device=request.param)


@pytest.fixture(scope="module")
def oracle(opened: OpenedAdapter, tiny_model: Path) -> Oracle:
    return Oracle(opened, tiny_model)


@pytest.fixture(scope="module")
def held_out(opened: OpenedAdapter) -> HeldOut:
    return held_out_rows(opened.found, opened.source)


@pytest.mark.parametrize("adapter", [True, False])
def test_losses_of_each_row_are_pefts(
    opened: OpenedAdapter,
    oracle: Oracle,
    held_out: HeldOut,
    adapter: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Few logits and few rows at a time, so that both borders are crossed.
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 300 * 7)
    done: list[int] = []
    with opened.qlora.adapter_on(adapter):
        found = row_losses(
            opened.qlora, held_out.pieces, tokens_at_once=150, after_batch=done.append
        )
    assert done[-1] == len(held_out.pieces) > len(done) > 1
    for place, row in enumerate(held_out.pieces):
        ids = row.input_ids.tolist()
        log = oracle.log_probabilities(ids, adapter=adapter)
        loss = [-log[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
        right = [int(log[t].argmax()) == ids[t + 1] for t in range(len(ids) - 1)]
        label = row.loss_mask[1:].tolist()
        assert 0 < sum(label) < len(label)
        assert found.loss[place] == pytest.approx(sum(loss), rel=1e-5)
        assert found.label_loss[place] == pytest.approx(
            sum(value for value, one in zip(loss, label, strict=True) if one), rel=1e-5
        )
        assert found.tokens[place] == len(label)
        assert found.labels[place] == sum(label)
        assert found.right[place] == sum(right)
        assert found.label_right[place] == sum(
            value for value, one in zip(right, label, strict=True) if one
        )
    if adapter:
        assert found.label_right.sum() > 0


def test_scaled_and_capped_logits_are_judged_as_they_are(
    opened: OpenedAdapter, held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.evaluate.held_out import held_out_loss

    monkeypatch.setattr(opened.qlora, "head", replace(opened.qlora.head, scale=3.0, softcap=2.0))
    found = row_losses(opened.qlora, held_out.pieces)
    loss = held_out_loss(opened.qlora, held_out.pieces)
    assert found.labels.sum() == loss.labels
    assert found.label_loss.sum() / loss.labels == pytest.approx(loss.loss, rel=1e-5)


def test_pieces_of_a_row_are_one_row() -> None:
    sums = RowLosses(*(np.array([1, 2, 3]) * factor for factor in (1.0, 1, 1, 2.0, 1, 1)))
    whole = sums.summed(np.array([2, 0, 2]), 3)
    assert whole.loss.tolist() == [2.0, 0.0, 4.0]
    assert whole.label_loss.tolist() == [4.0, 0.0, 8.0]
    assert whole.tokens.tolist() == [2, 0, 4]


QUESTIONS = [
    Question("Say the number 3 in words.", ("It is three.", "no", "It is one and 3."), 0),
    Question("The number is 7.", ("one", "two one one"), 1, instruction="Say it in words."),
]


@pytest.mark.parametrize("adapter", [True, False])
def test_choices_are_as_likely_as_peft_finds_them(
    opened: OpenedAdapter, oracle: Oracle, held_out: HeldOut, adapter: bool
) -> None:
    tokenizer = opened.tokenizer
    rows = choice_rows(QUESTIONS, held_out.template, tokenizer, 256)
    with opened.qlora.adapter_on(adapter):
        found = likelihoods(opened.qlora, QUESTIONS, rows)
    for question, log, tokens in zip(QUESTIONS, found.log, found.tokens, strict=True):
        asked = "\n\n".join(filter(None, (question.instruction, question.question)))
        messages = [{"role": "user", "content": asked}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for choice, ours, count in zip(question.choices, log, tokens, strict=True):
            ids = tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
            assert ids[: len(before)] == before
            of = oracle.log_probabilities(ids, adapter=adapter)
            expected = sum(of[t - 1, ids[t]].item() for t in range(len(before), len(ids)))
            assert ours == pytest.approx(expected, rel=1e-5)
            assert count == len(ids) - len(before)
    by_sum, by_token = found.chosen(by_token=False), found.chosen(by_token=True)
    assert by_sum.tolist() == [int(np.argmax(log)) for log in found.log]
    means = [log / tokens for log, tokens in zip(found.log, found.tokens, strict=True)]
    assert by_token.tolist() == [int(np.argmax(mean)) for mean in means]


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("Q: {instruction}\nA: {output}", "Q: Do it.\n\nHow?\nA: "),
        ("{input}\n#\n{instruction}\nA: {output}", "How?\n#\nDo it.\nA: "),
        ("text", "Do it.\n\nHow? "),
    ],
)
def test_a_question_stands_where_the_format_has_a_place(
    opened: OpenedAdapter, template: str, prompt: str
) -> None:
    made, _ = make_template(
        DataRecipe(path="rows.jsonl", template=template), opened.tokenizer, texts=template == "text"
    )
    question = Question("How?", ("so", "not so"), 0, instruction="Do it.")
    first, second = choice_rows([question], made, opened.tokenizer, 256)
    decode = opened.tokenizer.decode
    assert decode(first.input_ids[~first.loss_mask]) == prompt
    assert decode(second.input_ids[second.loss_mask]) == "not so"
    with pytest.raises(DataError, match=r"question 1 has \d+ tokens .* takes 9"):
        choice_rows([question], made, opened.tokenizer, 9)


def test_questions_of_a_file(tmp_path: Path) -> None:
    choices = ["red", "B", "blue"]
    path = write_lines(
        tmp_path / "q.jsonl",
        {"question": "?", "choices": choices, "answer": 2},
        {"question": "?", "choices": choices, "answer": "c."},
        {"question": "?", "choices": choices, "answer": "B"},
        {"question": "?", "choices": choices, "answer": "red", "instruction": "Name it."},
    )
    found = read_questions(path)
    assert [one.answer for one in found] == [2, 2, 1, 0]
    assert [one.instruction for one in found] == [None, None, None, "Name it."]
    assert read_questions(path, limit=1) == found[:1]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "no text under question"),
        ({"question": "?", "choices": ["a"], "answer": 0}, "a list of 2 to 26 texts"),
        ({"question": "?", "choices": "ab", "answer": 0}, "a list of 2 to 26 texts"),
        ({"question": "?", "choices": ["a", "a"], "answer": 0}, "the same text"),
        ({"question": "?", "choices": ["x", "y"], "answer": 2}, "0 to 1, its letter, A to B"),
        ({"question": "?", "choices": ["x", "y"], "answer": True}, "0 to 1, its letter"),
        ({"question": "?", "choices": ["x", "y"], "answer": "C"}, "0 to 1, its letter"),
        ({"question": "?", "choices": ["x", "y"], "answer": 0, "instruction": 1}, "instruction"),
    ],
)
def test_a_wrong_question_is_named(tmp_path: Path, row: dict[str, object], says: str) -> None:
    good = {"question": "?", "choices": ["x", "y"], "answer": 0}
    path = write_lines(tmp_path / "q.jsonl", good, row)
    with pytest.raises(DataError, match="row 2: ") as caught:
        read_questions(path)
    assert says in str(caught.value)
