"""Many rows, which lie in files, against few, which lie in memory: the same rows and findings.

What is many is set to three here. Few rows are the reference: other tests compare them with what
was written by hand.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_case import tokenizer_of
from halfbyte.data import json_list, spool
from halfbyte.data.batching import Batches
from halfbyte.data.packing import Packs
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.data.source_json import read_json
from halfbyte.errors import DataError
from halfbyte.recipe import Recipe

MANY = 3
CONTEXT = 200
CLEANING = [
    {"filter": "exact_duplicates"},
    {"filter": "length", "answer_min_words": 3},
    {"filter": "pattern", "replace": "doctor", "replacement": "nurse"},
    {"filter": "overlap_with_held_out", "by": "answer"},
]
SOURCES = [
    {"path": "questions.jsonl", "weight": 0.5},
    {"path": "conversations.jsonl", "weight": 0.3, "repeat": 2},
    {"path": "texts.jsonl", "weight": 0.2},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    drawn = random.Random(3)
    words = ["heart", "pain", "doctor", "hello", "fever", "please", "water", "take", "rest", "then"]

    def text(least: int, most: int) -> str:
        return " ".join(drawn.choices(words, k=drawn.randint(least, most))).capitalize() + "."

    questions = [
        {
            "instruction": text(2, 9),
            "input": "" if n % 3 else text(3, 3),
            "output": "" if n % 17 == 0 else text(1, 60),
        }
        for n in range(60)
    ]
    questions[20] = questions[41] = dict(questions[5])
    questions[30]["output"] = "Broken Ã© text here, and more words follow."
    conversations = []
    for n in range(40):
        messages = [{"role": "system", "content": text(4, 4)}] if n % 11 == 0 else []
        for _ in range(drawn.randint(1, 4)):
            thought = f"<think>\n{text(3, 3)}\n</think>\n\n" if n % 2 else ""
            messages.append({"role": "user", "content": text(4, 4)})
            messages.append({"role": "assistant", "content": thought + text(1, 25)})
        if n % 13 == 5:
            messages[-1]["content"] = ""
        conversations.append({"messages": messages})
    texts = [{"text": text(1, 90)} for _ in range(30)]
    for name, rows in [
        ("questions", questions),
        ("conversations", conversations),
        ("texts", texts),
    ]:
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "questions.json").write_text(json.dumps(questions, indent=1))
    with (folder / "questions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(questions[0]))
        writer.writeheader()
        writer.writerows(questions)
    table = pyarrow.Table.from_pylist(questions)
    pyarrow.parquet.write_table(table, folder / "questions.parquet", row_group_size=25)
    pyarrow.feather.write_feather(table, folder / "questions.arrow")
    return folder


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{ending}": ("qwen-2.5", {"path": f"questions.{ending}"})
        for ending in ("jsonl", "json", "csv", "parquet", "arrow")
    },
    **{
        f"{how} {name}": (name, {"path": path, "long_rows": how, "max_length": length})
        for how in ("cut_right", "cut_left", "drop", "split")
        for name, path, length in [
            ("llama-2", "questions.jsonl", 100),
            ("qwen-3", "conversations.jsonl", 110),
            ("qwen-2.5", "texts.jsonl", 32),
        ]
    },
    "refused": ("gemma-2", {"path": "conversations.jsonl"}),
    "several rows of one": ("mistral-nemo", {"path": "conversations.jsonl", "loss_on": "last"}),
    "cleaned": ("qwen-2.5", {"path": "questions.jsonl", "cleaning": CLEANING, "held_out": 9}),
    "cleaned, rows that follow": (
        "qwen-2.5",
        {
            "path": "questions.jsonl",
            "cleaning": CLEANING,
            "limit": 30,
            "held_out": 5,
            "held_out_from": "after",
        },
    ),
    "a file held out": (
        "qwen-2.5",
        {"path": "questions.jsonl", "cleaning": CLEANING, "held_out_path": "questions.csv"},
    ),
    "several sources": ("qwen-3", {"sources": SOURCES}),
    "several sources, cleaned": (
        "qwen-3",
        {"sources": SOURCES, "cleaning": CLEANING, "max_length": 40, "long_rows": "split"},
    ),
    "several sources, a file held out": (
        "gemma-2",
        {"sources": SOURCES, "held_out_path": "questions.csv"},
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Path) -> Path:
    monkeypatch.chdir(files)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "halfbyte" / "tokens"


def prepared(case: str, *, thorough: bool = False, **more: Any) -> Prepared:
    name, data = CASES[case]
    recipe = Recipe.model_validate({"model": {"name": "a"}, "data": {**data, **more}})
    return prepare(recipe, tokenizer_of(name), CONTEXT, thorough=thorough)


def found_again(data: Prepared) -> bool:
    return any(choice.key == "data.cache" for choice in data.choices)


def assert_same(one: Prepared, other: Prepared) -> None:
    for ours, theirs in ((one.train, other.train), (one.held_out, other.held_out)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.input_ids, b.input_ids)
            np.testing.assert_array_equal(a.loss_mask, b.loss_mask)
            assert a.input_ids.dtype == b.input_ids.dtype == np.int32
            assert (a.row, a.cut, a.start) == (b.row, b.cut, b.start)
        # What packing and plans are made of, against the rows themselves.
        assert ours.lengths.tolist() == [len(row) for row in theirs]
        assert ours.labels.tolist() == [row.num_labels for row in theirs]
        assert ours.cuts.tolist() == [row.cut for row in theirs]
    assert list(one.train_rows) == list(other.train_rows)
    assert list(one.held_out_rows) == list(other.held_out_rows)
    assert [one.train_rows[i] for i in range(len(one.train_rows))] == list(other.train_rows)
    for name in ("max_length", "formats", "audit", "warnings", "findings", "funnel"):
        assert getattr(one, name) == getattr(other, name), name
    choices = [[c for c in data.choices if c.key != "data.cache"] for data in (one, other)]
    assert choices[0] == choices[1]


@pytest.mark.parametrize("case", CASES)
def test_many_rows_are_as_few(case: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    thorough = "sources" in case or case in ("refused", "cleaned", "csv")
    few = prepared(case, thorough=thorough)
    assert not cache.exists(), "few rows are not kept"
    monkeypatch.setattr(spool, "KEPT", MANY)
    monkeypatch.setattr("halfbyte.data.tokenize.ROWS_AT_ONCE", 7)
    monkeypatch.setattr(spool, "READ_AT_ONCE", 300)
    many, again = (prepared(case, thorough=thorough) for _ in range(2))
    assert [found_again(many), found_again(again)] == [False, True]
    assert_same(few, many)
    assert_same(few, again)


def test_rows_left_out_are_named_with_their_source() -> None:
    """Rows 1, 18, … of the questions have no answer; here these are the second source."""
    data = prepared("several sources", sources=[{"path": "texts.jsonl"}, SOURCES[0]])
    [empty] = [one for one in data.findings if one.name == "empty-answers"]
    assert empty.places == [f"{n} of source 2" for n in (1, 18, 35, 52)]


def test_packs_and_batches_of_many_are_those_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    for many in (1000, MANY):
        monkeypatch.setattr(spool, "KEPT", many)
        data = prepared("several sources, cleaned")
        packs = Packs(data.train.lengths, data.max_length, 1)
        batches.append(Batches(data.train, 2, 2, 1, packs=packs))
    for step in range(1, batches[0].steps_per_epoch + 1):
        for one, other in zip(*(some.step(step) for some in batches), strict=True):
            assert one.rows == other.rows
            assert one.input_ids.tolist() == other.input_ids.tolist()
            assert one.labels.tolist() == other.labels.tolist()


def test_rows_of_much_text_are_many_too(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(spool, "KEPT_BYTES", 1000)
    few = prepared("jsonl")
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(spool, "KEPT_BYTES", 1 << 20)
    assert_same(few, prepared("jsonl"))


# What is kept is found again only for the same rows.

CHANGES: dict[str, dict[str, Any]] = {
    "the rows": {"limit": 50},
    "the template": {"template": "plain"},
    "the template's words": {"template": "Q: {instruction} {input}\nA:{output}"},
    "the system message": {"system": "Be brief."},
    "the instruction": {"instruction": "Answer.", "columns": {"input": "instruction"}},
    "what is learned": {"loss_on": "all"},
    "cleaning": {"cleaning": CLEANING[2:3]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_rows_are_made_anew(
    change: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    few = prepared("jsonl", **CHANGES[change])
    monkeypatch.setattr(spool, "KEPT", MANY)
    prepared("jsonl")
    data = prepared("jsonl", **CHANGES[change])
    assert not found_again(data)
    assert_same(few, data)
    assert len(list(cache.iterdir())) == 2


def test_another_tokenizer_makes_them_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "KEPT", MANY)
    prepared("jsonl")
    tokenizer = tokenizer_of("qwen-2.5")
    tokenizer.add_tokens(["doctor"])
    recipe = Recipe.model_validate({"model": {"name": "a"}, "data": CASES["jsonl"][1]})
    assert not found_again(prepare(recipe, tokenizer, CONTEXT))


def test_what_follows_from_the_tokens_is_decided_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    few = prepared("jsonl", max_length=32, long_rows="split", held_out=7, packing=True)
    monkeypatch.setattr(spool, "KEPT", MANY)
    prepared("jsonl")
    data = prepared("jsonl", max_length=32, long_rows="split", held_out=7, packing=True)
    assert found_again(data)
    assert_same(few, data)


def test_a_cache_that_is_damaged_off_or_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    few = prepared("refused")
    monkeypatch.setattr(spool, "KEPT", MANY)
    assert_same(few, prepared("refused", cache=False))
    assert not cache.exists()
    prepared("refused")
    for path in next(cache.iterdir()).iterdir():
        prepared("refused")
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
        data = prepared("refused")
        assert_same(few, data)
        assert not found_again(data), path.name
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        data = prepared("refused")
        assert not found_again(data)
        assert_same(few, data)


def test_progress_is_told_up_to_the_last_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.data.rendered.TOLD", 10)
    told: list[tuple[int, int]] = []
    recipe = Recipe.model_validate({"model": {"name": "a"}, "data": CASES["jsonl"][1]})
    tokenizer = tokenizer_of("qwen-2.5")
    prepare(recipe, tokenizer, CONTEXT, progress=lambda done, of: told.append((done, of)))
    assert told == [(done, 60) for done in range(10, 60, 10)]


# The JSON list that is read a window at a time, against the json module.


def loaded(text: str) -> tuple[Any, int | None]:
    """What ``text`` holds, or the line in which it is wrong."""
    try:
        return json.loads(text) if text.strip() else [], None
    except json.JSONDecodeError as error:
        return None, error.lineno


rows_of_anything = st.lists(
    st.dictionaries(
        st.text(max_size=3),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        max_size=3,
    ),
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(rows=rows_of_anything, window=st.integers(1, 40), data=st.data())
def test_a_list_in_windows_is_that_of_the_whole_text(
    rows: list[dict[str, Any]],
    window: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    indent = data.draw(st.none() | st.integers(0, 2))
    text = data.draw(st.sampled_from(["", " ", "\n\n"])) + json.dumps(
        rows, indent=indent, ensure_ascii=data.draw(st.booleans())
    )
    at = data.draw(st.integers(0, len(text)))
    spoilt = [text, text[:at], text[:at] + "x" + text[at:], text + " 1"]
    text = data.draw(st.sampled_from(spoilt))
    path = tmp_path_factory.mktemp("json") / "rows.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    found = []
    for characters in (window, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_list, "WINDOW", characters)
            try:
                table = read_json(path, None)
                found.append((table.columns, list(table.rows)))
            except DataError as error:
                found.append(str(error))
    assert found[0] == found[1]
    whole, line = loaded(text)
    if isinstance(found[0], tuple):
        assert found[0][1] == whole
    elif line is not None:
        assert f"line {line}: " in found[0]
