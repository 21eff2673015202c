"""Rows over the maximum length: what is kept, what is learned, and that it is learned once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.data.long_rows import Leading, fit_row
from halfbyte.recipe.schema import LongRows

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
