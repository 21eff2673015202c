"""Rows and examples kept in flat arrays and files, against plain lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.example import Example, Message
from halfbyte.data.example_store import ExampleStore
from halfbyte.data.row_store import RowStore, RowWriter

# Any characters, half surrogate pairs among them.
texts = st.text(max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
objects = st.dictionaries(texts, json_values, max_size=2)
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=texts,
    learn=st.none() | st.booleans(),
    reasoning=st.none() | texts,
    tool_calls=st.lists(objects, max_size=2).map(tuple),
    tool_call_id=st.none() | texts,
    name=st.none() | texts,
)
examples = st.builds(
    Example,
    row=st.integers(0, 1 << 40),
    messages=st.lists(messages, max_size=3).map(tuple),
    text=st.none() | texts,
    instruction=st.none() | texts,
    input=st.none() | texts,
    tools=st.lists(objects, max_size=2).map(tuple),
    source=st.integers(0, 3),
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(examples, max_size=6), kept=st.integers(0, 3), data=st.data())
def test_examples_are_those_that_were_added(
    rows: list[Example], kept: int, data: st.DataObject
) -> None:
    store = ExampleStore(kept=kept)
    for number, row in enumerate(rows):
        store.append(row)
        seen = data.draw(st.integers(0, number))  # read while others are still to come
        assert store[seen] == rows[seen]
    assert list(store) == rows
    assert len(store) == len(rows)
    assert store[1:3] == rows[1:3]
    if rows:
        assert store[-1] == rows[-1]
    with pytest.raises(IndexError):
        store[len(rows)]


tokens = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(tokens, max_size=8), chunk=st.integers(1, 4))
def test_rows_are_those_that_were_added(
    rows: list[list[tuple[int, bool]]], chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    whole = [
        TokenizedRow(
            np.array([i for i, _ in row], dtype=np.int32),
            np.array([m for _, m in row], dtype=bool),
            7 * number,
        )
        for number, row in enumerate(rows)
    ]
    writer = RowWriter(folder)
    for start in range(0, len(whole), chunk):
        writer.extend(whole[start : start + chunk])
    assert RowStore.read(folder) is None, "not whole before it is finished"
    for store in (writer.finish(), RowStore.of(whole), RowStore.read(folder)):
        assert store is not None
        assert len(store) == len(whole)
        assert store.lengths.tolist() == [len(row) for row in whole]
        for found, row in zip(store, whole, strict=True):
            assert found.input_ids.tolist() == row.input_ids.tolist()
            assert found.loss_mask.tolist() == row.loss_mask.tolist()
            assert (found.row, found.cut) == (row.row, 0)


def test_files_that_are_cut_off_are_none(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path)
    writer.extend([TokenizedRow(np.arange(5, dtype=np.int32), np.ones(5, dtype=bool), 0)])
    writer.finish()
    with (tmp_path / "ids.bin").open("r+b") as file:
        file.truncate(16)
    assert RowStore.read(tmp_path) is None
    assert RowStore.read(tmp_path / "nowhere") is None
