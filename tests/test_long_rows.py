"""Rows over the maximum length: what is kept, what is learned, and that it is learned once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.data.long_rows import Leading, fit_row
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.errors import DataError
from halfbyte.recipe import Recipe
from halfbyte.recipe.data_schema import LongRows

BOS = 1
ADDED = {0: Leading((), None), 1: Leading((BOS,), BOS), 2: Leading((BOS, 7), BOS)}
HOW: tuple[LongRows, ...] = ("cut_right", "cut_left", "drop", "split")


@st.composite
def long_rows(draw: st.DrawFn) -> tuple[TokenizedRow, int]:
    """A row whose tokens all differ, and how many leading ones it has."""
    lead = draw(st.sampled_from([0, 1, 2]))
    length = draw(st.integers(lead + 2, 60))
    ids = np.arange(100, 100 + length, dtype=np.int32)
    ids[:lead] = (BOS, 7)[:lead]
    learned = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    learned[: max(1, lead)] = False
    return TokenizedRow(ids, learned, row=9), lead


def learned_after(rows: list[TokenizedRow]) -> list[tuple[int, int]]:
    """(the token before, the token that is learned after it) of every label."""
    found = []
    for row in rows:
        batch = make_batch([row])
        for before, label in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            if label != -100:
                found.append((before, label))
    return found


@settings(deadline=None, max_examples=200)
@given(made=long_rows(), max_length=st.integers(8, 40))
def test_what_becomes_of_a_row(made: tuple[TokenizedRow, int], max_length: int) -> None:
    row, lead = made
    whole, body = row.input_ids.tolist(), row.input_ids[lead:].tolist()
    found = {how: fit_row(row, max_length, how, ADDED[lead]) for how in HOW}
    if len(row) <= max_length:
        assert all(rows == [row] for rows in found.values())
        return
    over = len(row) - max_length
    [right], [left], pieces = found["cut_right"], found["cut_left"], found["split"]
    assert found["drop"] == []
    assert right.input_ids.tolist() == whole[:max_length]
    assert left.input_ids.tolist() == whole[:lead] + whole[lead + over :]
    assert (right.cut, right.start) == (over, 0)
    assert (left.cut, left.start) == (over, over)
    assert all(one.row == 9 for rows in found.values() for one in rows)

    # Whatever is learned is learned after the token that it followed in the row.
    every = learned_after([row])
    assert learned_after([right]) == [pair for pair in every if pair[1] in whole[:max_length]]
    assert learned_after([left]) == [pair for pair in every if pair[0] in left.input_ids[lead:]]

    # Pieces are the row, its beginning at each of them, and the last token again at the next.
    assert len(pieces) > 1
    assert all(2 + lead <= len(piece) <= max_length for piece in pieces)
    assert all(len(piece) == max_length for piece in pieces[:-1])
    assert all(piece.input_ids[:lead].tolist() == whole[:lead] for piece in pieces)
    joined = pieces[0].input_ids[lead:].tolist()
    for piece in pieces[1:]:
        assert piece.start == len(joined) - 1
        assert joined[-1] == piece.input_ids[lead]
        joined += piece.input_ids[lead + 1 :].tolist()
    assert joined == body
    assert all(piece.cut == 0 for piece in pieces)
    assert learned_after(pieces) == every
    assert sum(piece.num_labels for piece in pieces) == row.num_labels


def test_a_token_that_begins_every_turn_is_no_beginning_of_the_sequence() -> None:
    turns = TokenizedRow(np.array([5, 2, 3, 5, 4, 6, 7, 8, 9, 10], np.int32), np.ones(10, bool), 0)
    by_template = Leading((), 5)
    [left] = fit_row(turns, 8, "cut_left", by_template)
    assert left.input_ids.tolist() == [3, 5, 4, 6, 7, 8, 9, 10]
    once = TokenizedRow(np.array([5, *range(20, 29)], np.int32), np.ones(10, bool), 0)
    [left] = fit_row(once, 8, "cut_left", by_template)
    assert left.input_ids.tolist() == [5, *range(22, 29)]
    assert left.loss_mask.tolist() == [True, False, *[True] * 6]  # the first never counts
    # A row that does not begin as others do has nothing to keep.
    bare = TokenizedRow(np.arange(20, 30, dtype=np.int32), np.ones(10, bool), 0)
    [left] = fit_row(bare, 8, "cut_left", Leading((5,), 5))
    assert left.input_ids.tolist() == [*range(22, 30)]


def test_leading_tokens_must_leave_room() -> None:
    row = TokenizedRow(np.arange(12, dtype=np.int32), np.ones(12, bool), 0)
    with pytest.raises(ValueError, match="7 leading tokens leave no room in 8"):
        fit_row(row, 8, "split", Leading(tuple(range(7)), None))


def prepared(tokenizer: Any, folder: Path, answers: list[str], **data: Any) -> Prepared:
    path = folder / "rows.jsonl"
    rows = [{"instruction": "Say it.", "output": answer} for answer in answers]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    recipe = {"model": {"name": "tiny"}, "data": {"path": str(path), "held_out": 0, **data}}
    return prepare(Recipe.model_validate(recipe), tokenizer, 256)


LONG = "This answer is one of many words, and it does not end before the others do. " * 4


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def whole_row(tokenizer: Any, answer: str) -> list[int]:
    text = f"<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("how", HOW)
def test_the_audit_counts_what_became_of_long_rows(
    how: LongRows, tokenizer: Any, tmp_path: Path
) -> None:
    answers = ["Short.", LONG, "Also short.", LONG[:-1]]
    whole = [whole_row(tokenizer, answer) for answer in answers]
    found = prepared(tokenizer, tmp_path, answers, long_rows=how, max_length=80)
    audit, over = found.audit, sum(max(0, len(row) - 80) for row in whole)
    assert all(len(row) <= 80 for row in found.train)
    assert audit.tokens == sum(map(len, found.train))
    assert audit.labels == sum(row.num_labels for row in found.train)
    pieces = {n: [row for row in found.train if row.row == n] for n in range(4)}
    assert [row.input_ids.tolist() for n in (0, 2) for row in pieces[n]] == [whole[0], whole[2]]
    if how == "drop":
        assert audit.rows_dropped == {"more tokens than data.max_length": 2}
        assert (audit.rows_used, audit.rows_shortened, audit.tokens_cut) == (2, 0, 0)
        assert found.train_rows == [found.train_rows[0], found.train_rows[1]]
    elif how == "split":
        assert audit.rows_dropped == {}
        assert (audit.rows_used, audit.rows_shortened, audit.rows_split) == (4, 0, 2)
        count = [-(-(len(row) - 1) // 79) for row in whole]  # each adds what the last has not
        assert [len(pieces[n]) for n in range(4)] == count
        assert (audit.pieces, audit.pieces_dropped) == (count[1] + count[3], 0)
        assert audit.length_percentiles["100"] == max(map(len, whole))
        # All that a whole row learns.
        alone = prepared(tokenizer, tmp_path, answers, max_length=1000)
        assert learned_after(found.train) == learned_after(alone.train)
    else:
        assert audit.rows_dropped == {}
        assert (audit.rows_used, audit.rows_shortened, audit.tokens_cut) == (4, 2, over)
        for n in (1, 3):
            kept = whole[n][:80] if how == "cut_right" else whole[n][-80:]
            assert [row.input_ids.tolist() for row in pieces[n]] == [kept]
    assert [row.row for row in found.train_rows] == [row.row for row in found.train]


def test_a_piece_with_nothing_to_learn_is_left_out_and_counted(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"instruction": LONG, "output": "Yes."}
    path.write_text(json.dumps(row), encoding="utf-8")
    recipe = {
        "model": {"name": "tiny"},
        "data": {"path": str(path), "held_out": 0, "long_rows": "split", "max_length": 60},
    }
    found = prepare(Recipe.model_validate(recipe), tokenizer, 256)
    assert all(row.num_labels for row in found.train)
    assert found.audit.pieces == len(found.train)
    assert found.audit.pieces_dropped > 1
    recipe["data"]["long_rows"] = "drop"  # type: ignore[index]
    with pytest.raises(
        DataError, match=r"1 of 1 rows have more tokens than data\.max_length; raise"
    ):
        prepare(Recipe.model_validate(recipe), tokenizer, 256)


def test_a_pack_is_long_enough_for_eight_rows(tokenizer: Any, tmp_path: Path) -> None:
    answers = [f"It is {n}." for n in range(100, 140)]
    assert prepared(tokenizer, tmp_path, answers).max_length < 50
    found = prepared(tokenizer, tmp_path, answers, packing=True)
    mean = found.audit.tokens / len(answers)
    assert 8 * mean <= found.max_length <= 256  # the model's own
    [choice] = [c for c in found.choices if c.key == "data.max_length"]
    assert "eight rows" in choice.reason
    few = prepared(tokenizer, tmp_path, answers, packing=True, max_length=64)
    assert few.max_length == 64
