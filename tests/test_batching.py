"""Rows end to end: what a batch holds and which rows a step gets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import Batches, make_batch


@st.composite
def rows_of_tokens(draw: st.DrawFn) -> list[TokenizedRow]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    return [
        TokenizedRow(
            generator.integers(0, 50, length).astype(np.int32),
            generator.random(length) < 0.6,  # the first token may be marked: it never counts
            row=100 + number,
        )
        for number, length in enumerate(lengths)
    ]


@settings(deadline=None)
@given(rows=rows_of_tokens(), spare=st.integers(0, 3))
def test_a_batch_is_what_a_loop_over_tokens_makes(rows: list[TokenizedRow], spare: int) -> None:
    ids, positions, labels, borders = [], [], [], [0]
    for row in rows:
        for at in range(len(row)):
            ids.append(int(row.input_ids[at]))
            positions.append(at)
            follows = at + 1 < len(row) and row.loss_mask[at + 1]
            labels.append(int(row.input_ids[at + 1]) if follows else -100)
        borders.append(len(ids))
    batch = make_batch(rows, len(rows) + spare)
    assert batch.input_ids.tolist() == ids
    assert batch.position_ids.tolist() == positions
    assert batch.labels.tolist() == labels
    assert batch.cu_seqlens.tolist() == borders + [borders[-1]] * spare
    assert batch.num_labels == sum(label != -100 for label in labels)
    assert batch.num_labels == sum(row.num_labels for row in rows)
    assert batch.max_seqlen == max(map(len, rows))
    assert batch.rows == tuple(row.row for row in rows)
    assert batch.cu_seqlens.dtype == torch.int32
    assert {t.dtype for t in (batch.input_ids, batch.position_ids, batch.labels)} == {torch.int64}


@settings(deadline=None)
@given(rows=rows_of_tokens(), data=st.data())
def test_another_row_changes_nothing_in_this_one(
    rows: list[TokenizedRow], data: st.DataObject
) -> None:
    changed = data.draw(st.integers(0, len(rows) - 1))
    [other, *_] = data.draw(rows_of_tokens())
    before, after = make_batch(rows), make_batch([*rows[:changed], other, *rows[changed + 1 :]])
    for number in range(len(rows)):
        if number != changed:
            a, b = (slice(*batch.cu_seqlens[number : number + 2]) for batch in (before, after))
            assert torch.equal(before.input_ids[a], after.input_ids[b])
            assert torch.equal(before.position_ids[a], after.position_ids[b])
            assert torch.equal(before.labels[a], after.labels[b])


def plain_rows(count: int) -> list[TokenizedRow]:
    return [
        TokenizedRow(np.full(3, n, dtype=np.int32), np.ones(3, dtype=bool), n) for n in range(count)
    ]


def rows_by_step(batches: Batches, steps: range) -> list[list[tuple[int, ...]]]:
    return [[batch.rows for batch in batches.step(step)] for step in steps]


@pytest.mark.parametrize(
    ("count", "size", "accumulation"), [(500, 4, 1), (10, 4, 1), (23, 3, 4), (5, 8, 2), (16, 4, 4)]
)
def test_each_epoch_has_every_row_once(count: int, size: int, accumulation: int) -> None:
    batches = Batches(plain_rows(count), size, accumulation, seed=42)
    per_epoch = math.ceil(count / (size * accumulation))
    assert batches.steps_per_epoch == per_epoch
    orders = []
    for epoch in range(3):
        steps = rows_by_step(batches, range(1 + epoch * per_epoch, 1 + (epoch + 1) * per_epoch))
        assert all(len(step) == accumulation for step in steps[:-1])
        assert 1 <= len(steps[-1]) <= accumulation
        sizes = [len(rows) for step in steps for rows in step]
        assert sizes[:-1] == [size] * (len(sizes) - 1)
        order = [row for step in steps for rows in step for row in rows]
        assert sorted(order) == list(range(count))
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    for batch in batches.step(per_epoch):
        assert len(batch.cu_seqlens) == size + 1


def test_a_step_follows_from_the_seed_and_its_number_alone() -> None:
    one = rows_by_step(Batches(plain_rows(23), 3, 2, seed=1), range(1, 13))
    again = Batches(plain_rows(23), 3, 2, seed=1)
    for step in (12, 1, 7, 4, 12):
        assert rows_by_step(again, range(step, step + 1)) == one[step - 1 : step]
    assert rows_by_step(Batches(plain_rows(23), 3, 2, seed=2), range(1, 13)) != one
    with pytest.raises(ValueError, match="from 1"):
        again.step(0)


def test_accumulation_only_divides_a_step() -> None:
    whole = Batches(plain_rows(21), 8, 1, seed=3)
    parts = Batches(plain_rows(21), 2, 4, seed=3)
    for step in range(1, 7):
        [one] = whole.step(step)
        many = parts.step(step)
        assert sum((batch.rows for batch in many), ()) == one.rows
        assert sum(batch.num_labels for batch in many) == one.num_labels
        assert torch.equal(torch.cat([batch.labels for batch in many]), one.labels)


def test_rows_beyond_the_capacity_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows do not fit"):
        make_batch(plain_rows(3), 2)
    with pytest.raises(ValueError, match="no rows"):
        Batches([], 1, 1, 0)
