"""Rows end to end: what a batch holds and which rows a step gets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data.batch import Bucket, TokenizedRow
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
    assert batch.num_tokens == len(ids)
    assert batch.label_index.tolist() == [t for t, label in enumerate(labels) if label != -100]
    assert batch.label_ids.tolist() == [label for label in labels if label != -100]
    int64 = (batch.input_ids, batch.position_ids, batch.labels, batch.label_index, batch.label_ids)
    assert {t.dtype for t in int64} == {torch.int64}


@settings(deadline=None)
@given(rows=rows_of_tokens(), spare=st.integers(0, 3), data=st.data())
def test_padding_lies_behind_the_rows_in_rows_of_its_own(
    rows: list[TokenizedRow], spare: int, data: st.DataObject
) -> None:
    capacity = len(rows) + spare
    plain = make_batch(rows, capacity)
    tokens = plain.num_tokens + data.draw(st.integers(0, 30))
    labels = plain.num_labels + data.draw(st.integers(0, tokens - plain.num_labels))
    piece = data.draw(st.none() | st.integers(plain.max_seqlen, 40))
    batch = make_batch(rows, capacity, tokens, labels, piece)
    used = plain.num_tokens
    for padded, real, nothing in (
        (batch.input_ids, plain.input_ids, 0),
        (batch.labels, plain.labels, -100),
    ):
        assert torch.equal(padded[:used], real)
        assert padded[used:].tolist() == [nothing] * (tokens - used)
    assert torch.equal(batch.position_ids[:used], plain.position_ids)
    borders = batch.cu_seqlens.tolist()
    assert borders[: capacity + 1] == plain.cu_seqlens.tolist()
    # One border more where nothing bounds the rows of padding, else as many as could be needed.
    assert len(borders) == capacity + 1 + (1 if piece is None else math.ceil(tokens / piece))
    assert borders[-1] == tokens
    lengths = [b - a for a, b in itertools.pairwise(borders)]
    assert max(lengths) <= batch.max_seqlen == (piece or max(lengths))
    counted = [at for length in lengths for at in range(length)]
    assert batch.position_ids.tolist() == counted
    assert len(batch.label_index) == len(batch.label_ids) == labels
    assert torch.equal(batch.label_index[: plain.num_labels], plain.label_index)
    assert torch.equal(batch.label_ids, batch.labels[batch.label_index])
    assert int((batch.label_ids != -100).sum()) == plain.num_labels == batch.num_labels
    assert (batch.num_tokens, batch.rows) == (used, plain.rows)


def test_what_does_not_fit_a_bucket_is_refused() -> None:
    rows = plain_rows(3)  # of three tokens and two labels each
    with pytest.raises(ValueError, match="9 tokens"):
        make_batch(rows, tokens=8)
    with pytest.raises(ValueError, match="6 labels"):
        make_batch(rows, tokens=12, labels=5)
    with pytest.raises(ValueError, match="up to 3"):
        make_batch(rows, tokens=12, max_seqlen=2)


def test_a_micro_batch_takes_the_first_bucket_that_holds_it() -> None:
    generator = np.random.default_rng(0)
    rows = [
        TokenizedRow(np.full(n, n, dtype=np.int32), generator.random(n) < 0.5, number)
        for number, n in enumerate(generator.integers(2, 40, 50))
    ]
    buckets = [Bucket(160, 160, 40), Bucket(64, 32, 32), Bucket(64, 64, 40), Bucket(96, 40, 40)]
    plain, padded = Batches(rows, 4, 2, seed=5), Batches(rows, 4, 2, seed=5, buckets=buckets)
    taken = set()
    for step in range(1, 21):
        for one, other in zip(plain.step(step), padded.step(step), strict=True):
            size = one.num_tokens, one.num_labels, one.max_seqlen
            bucket = next(b for b in sorted(buckets) if b.holds(*size))
            taken.add(bucket)
            assert len(other.input_ids) == bucket.tokens
            assert len(other.label_index) == bucket.labels
            assert other.max_seqlen == bucket.max_seqlen
            assert torch.equal(other.input_ids[: one.num_tokens], one.input_ids)
            assert (other.rows, other.num_tokens) == (one.rows, one.num_tokens)
    assert len(taken) == 4
    with pytest.raises(ValueError, match="no bucket"):
        Batches(rows, 4, 2, seed=5, buckets=[Bucket(32, 32, 32)]).step(1)


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
