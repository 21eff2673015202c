"""Several sources in one run: how many rows of each, which, and which are held out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from typer.testing import CliRunner

from halfbyte.cli.app import app
from halfbyte.data.mixing import draw, mix, mixed_counts
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.data.split import shares_of
from halfbyte.errors import DataError, RecipeError
from halfbyte.events.types import Answered
from halfbyte.recipe import Recipe
from halfbyte.recipe.data_schema import SourceRecipe
from halfbyte.recipe.load import parse_recipe
from halfbyte.report.page_one import shown_in_full
from halfbyte.report.story import answers_of


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


# ---- how many ----------------------------------------------------------------------------------


def one_at_a_time(weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Rows of each source, taken one by one: a source with the weight w gives its k-th at the time
    k / w, until one of them has given its last."""
    clock = sorted(
        (Fraction(k) / Fraction(str(weight)), source)
        for source, (weight, rows) in enumerate(zip(weights, most, strict=True))
        for k in range(1, rows + 1)
    )
    taken = Counter[int]()
    end = None
    for time, source in clock:
        if end is not None and time > end:
            break
        taken[source] += 1
        if taken[source] == most[source]:
            end = time
    return [taken[source] for source in range(len(weights))]


def weighed(weights: Sequence[float], repeats: Sequence[int] | None = None) -> list[SourceRecipe]:
    often = repeats or [1] * len(weights)
    return [
        SourceRecipe(path=f"{i}.jsonl", weight=w, repeat=r)
        for i, (w, r) in enumerate(zip(weights, often, strict=True))
    ]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.sampled_from([1, 2, 5, 0.1, 0.7, 3]), st.integers(1, 3)),
        min_size=1,
        max_size=4,
    )
)
def test_shares_are_those_of_rows_taken_one_at_a_time(
    given: list[tuple[int, float, int]],
) -> None:
    rows, weights, repeats = (list(part) for part in zip(*given, strict=True))
    most = [r * n for r, n in zip(repeats, rows, strict=True)]
    assert mixed_counts(weighed(weights, repeats), rows) == one_at_a_time(weights, most)


def test_rows_weights_and_neither_side_by_side() -> None:
    sources = [
        SourceRecipe(path="all"),
        SourceRecipe(path="some", rows=30),
        SourceRecipe(path="few", rows=30),
        SourceRecipe(path="often", rows=30, repeat=4),
        SourceRecipe(path="twice", repeat=2),
        *weighed([0.7, 0.3]),
    ]
    assert mixed_counts(sources, [10, 100, 8, 8, 5, 70, 1000]) == [10, 30, 8, 30, 10, 70, 30]
    found = mix(sources, [10, 100, 8, 8, 5, 70, 1000], 42)
    [warning] = found.warnings
    assert warning.startswith("few has 8 rows, and 30 are asked for; all of them are taken")
    assert "30 of 1,000 of 1.jsonl (16.0%)" in found.choices[0].value
    assert found.choices[0].reason == "0.jsonl is the scarcest for its weight and is used up"
    assert found.times.sum() == 188
    [warning] = mix(weighed([1000, 1]), [10, 10], 42).warnings
    assert "not one of its 10 rows is taken" in warning
    assert mix([SourceRecipe(path="all")], [3], 42).choices == []


# ---- which -------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 200), st.integers(0, 9))
def test_rows_are_drawn_as_evenly_as_can_be(rows: int, count: int, seed: int) -> None:
    times = draw(rows, count, (seed, 0))
    assert times.sum() == count
    assert times.max() - times.min() <= 1
    assert (times == draw(rows, count, (seed, 0))).all()


def test_what_is_drawn_of_a_source_depends_on_the_seed_alone() -> None:
    def drawn(seed: int, *others: SourceRecipe) -> list[int]:
        sources = [SourceRecipe(path="a", rows=20), *others]
        return mix(sources, [100, *[50] * len(others)], seed).times[:100].tolist()

    assert drawn(1) == drawn(1, SourceRecipe(path="b"), SourceRecipe(path="c", rows=7))
    assert drawn(1) != drawn(2)
    # And every row is as likely as every other.
    often = sum(np.array(drawn(seed)) for seed in range(300))
    assert often.min() > 30
    assert often.max() < 95  # 60 ± 5 standard deviations of 7


@given(st.integers(0, 50), st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_a_number_is_divided_to_the_nearest_row(wanted: int, counts: list[int]) -> None:
    if wanted > sum(counts):
        return
    shares = shares_of(wanted, counts)
    assert sum(shares) == wanted
    for share, count in zip(shares, counts, strict=True):
        assert share <= count
        assert abs(share - wanted * count / max(1, sum(counts))) < 1


# ---- in a run ----------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "chat.jsonl": lambda n: {
        "messages": [
            {"role": "user", "content": f"What is {n} + 1?"},
            {"role": "assistant", "content": f"It is {n + 1}."},
        ]
    },
    "alpaca.jsonl": lambda n: {"instruction": "Add one.", "input": f"{n}", "output": f"{n + 1}"},
    "pairs.jsonl": lambda n: {"frage": f"{n} plus 1?", "zahl": n + 1},
}


def write(folder: Path, name: str, count: int) -> str:
    lines = [json.dumps(KINDS[name](n)) for n in range(count)]
    (folder / name).write_text("\n".join(lines))
    return str(folder / name)


def prepared(
    tokenizer: Any, sources: list[dict[str, Any]], seed: int = 42, **data: Any
) -> Prepared:
    whole = {"model": {"name": "tiny"}, "seed": seed, "data": {"sources": sources, **data}}
    return prepare(Recipe.model_validate(whole), tokenizer, 256)


def test_sources_of_several_formats_train_together(tokenizer: Any, tmp_path: Path) -> None:
    jinja = {"user": "{{ frage }}", "assistant": "Es ist {{ zahl }}."}
    sources = [
        {"path": write(tmp_path, "chat.jsonl", 200), "weight": 2},
        {"path": write(tmp_path, "alpaca.jsonl", 150), "weight": 1},
        {"path": write(tmp_path, "pairs.jsonl", 90), "rows": 60, "jinja": jinja, "limit": 70},
    ]
    found = prepared(tokenizer, sources, held_out=36)
    trained = Counter(row.source for row in found.train_rows)
    held = Counter(row.source for row in found.held_out_rows)
    assert [trained[i] + held[i] for i in range(3)] == [200, 100, 60]
    assert [held[i] for i in range(3)] == [20, 10, 6]
    # A row is numbered in its own source, stands once, and is read as that source says.
    seen = {(row.source, row.row) for row in [*found.train_rows, *found.held_out_rows]}
    assert len(seen) == 360
    assert max(row.row for row in found.train_rows if row.source == 2) < 70
    text = {0: "What is {} + 1?", 1: "Add one.\n\n{}", 2: "{} plus 1?"}
    for row, tokens in zip(found.train_rows, found.train, strict=True):
        question = text[row.source].format(row.row)
        assert f"user\n{question}<|im_end|>" in tokenizer.decode(tokens.input_ids)
    told = {choice.key: choice.value for choice in found.choices}
    assert told["data.sources[1].format"] == "messages"
    assert told["data.sources[2].columns.input"] == "input"
    assert told["data.sources[3].format"] == "jinja"
    assert "200 of 200 of" in told["data.sources"]
    assert found.audit.columns[f"messages of {sources[0]['path']}"] == "messages"
    assert len(str(found.audit.sha256)) == 64
    # The same recipe gives the same rows, another seed others.
    assert prepared(tokenizer, sources, held_out=36).train_rows == found.train_rows
    assert prepared(tokenizer, sources, 7, held_out=36).train_rows != found.train_rows


def test_rows_that_stand_several_times_are_never_also_held_out(
    tokenizer: Any, tmp_path: Path
) -> None:
    sources = [
        {"path": write(tmp_path, "chat.jsonl", 40), "repeat": 3},
        {"path": write(tmp_path, "alpaca.jsonl", 100)},
    ]
    found = prepared(tokenizer, sources, held_out=35)
    often = Counter((row.source, row.row) for row in found.train_rows)
    assert len(found.train) == len(found.train_rows) == 30 * 3 + 75
    assert {source: n for (source, _), n in often.items()} == {0: 3, 1: 1}
    assert set(often.values()) == {1, 3}
    assert not often.keys() & {(row.source, row.row) for row in found.held_out_rows}
    assert Counter(row.source for row in found.held_out_rows) == {0: 10, 1: 25}
    assert "duplicates" not in {finding.name for finding in found.findings}


def test_a_file_of_held_out_rows_beside_several_sources(tokenizer: Any, tmp_path: Path) -> None:
    sources = [{"path": write(tmp_path, "chat.jsonl", 30)}]
    other = write(tmp_path, "alpaca.jsonl", 9)
    found = prepared(tokenizer, sources, held_out_path=other)
    assert [row.source for row in found.held_out_rows] == [1] * 9
    assert len(found.train) == 30
    assert any("are of the format instruction, those that train" in w for w in found.warnings)


def test_a_broken_row_is_named_with_its_source(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}] * 2}))
    sources = [{"path": write(tmp_path, "alpaca.jsonl", 30)}, {"path": str(path)}]
    with pytest.raises(DataError, match=rf"^{path}, row 1, messages 1 and 2 are both the user's"):
        prepared(tokenizer, sources)


def halfbyte(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_line_shows_what_was_recognised(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources and patterns are looked for beside the recipe too."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_model)
    write(folder, "chat.jsonl", 40)
    write(folder, "alpaca.jsonl", 40)
    (folder / "r.yaml").write_text(
        "model: {name: model}\n"
        "data: {sources: [{path: 'ch*.jsonl', weight: 1}, {path: alpaca.jsonl, weight: 0.5}]}\n"
    )
    monkeypatch.chdir(tmp_path)
    shown = halfbyte("train", "recipes/r.yaml", "--dry-run")
    assert "data.sources[1].format = messages: the column messages holds messages" in shown
    at = folder.resolve()
    assert f"40 of 40 of {at}/ch*.jsonl (66.7%); 20 of 40 of {at}/alpaca.jsonl (33.3%)" in shown
    assert "ch*.jsonl, alpaca.jsonl: 60 rows read" in shown
    settings = halfbyte("recipe", "recipes/r.yaml")
    chat = f"{at}/ch*.jsonl (format messages, weight 1)"
    alpaca = f"{at}/alpaca.jsonl (format instruction, weight 0.5)"
    assert f"data.sources = {chat}, {alpaca}" in settings
    shown = halfbyte("init", "recipes/chat.jsonl", "--model", "recipes/model", "--out", "c.yaml")
    assert "format: messages: the column messages holds messages with role and content" in shown
    assert "What is 0 + 1?" in shown
    asked = Recipe.load("c.yaml").data
    assert (asked.format, asked.columns.messages) == ("messages", "messages")
    shown = halfbyte("train", "c.yaml", "--dry-run")
    assert "data.format" not in shown  # it is stated now
    assert "40 rows read" in shown


# ---- in a recipe -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("{sources: []}", "data.path is missing. It is needed: a JSON, JSONL, CSV, Parquet or"),
        ("{path: a, sources: [{path: b}]}", "data.sources stands in place of data.path; leave one"),
        ("{sources: [{path: a}], split: dev}", "data.split is for data.path; in data.sources each"),
        ("{sources: [{path: a}], limit: 3}", "data.limit is for data.path;"),
        ("{sources: [{path: a}], held_out_from: after}", "data.held_out_from must be random"),
        ("{sources: [{weight: 1}]}", "data.sources[1] needs path: "),
        ("{sources: [{path: a, rows: 1, weight: 2}]}", "data.sources[1].weight stands beside rows"),
        ("{sources: [{path: a, weight: 0}]}", "data.sources[1].weight must be a number above 0"),
        ("{sources: [{path: a, wieght: 1}]}", "data.sources[1].wieght is not a setting of such a"),
        ("{sources: [a.jsonl]}", "data.sources[1] must be a group of settings, not"),
        (
            "{sources: [{path: a}, {path: b, columns: {mesages: c}}]}",
            "data.sources[2].columns.mesages is not a setting",
        ),
        (
            "{sources: [{path: a, jinja: {user: b}}]}",
            "data.sources[1].jinja has user and needs assistant: a row is a question and",
        ),
        ("{path: a, jinja: {text: b, user: c}}", "data.jinja makes a text or a conversation, and"),
        ("{path: a, format: alpaca}", 'or jinja, not "alpaca"; here that is instruction.'),
    ],
)
def test_a_recipe_names_one_source_or_several(data: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"model: {{name: m}}\ndata: {data}\n", "r.yaml")
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("r.yaml, line 2: ")


# ---- in the report -----------------------------------------------------------------------------


def test_rows_of_one_number_in_two_sources_are_two_answers() -> None:
    def said(source: int, when: str) -> Answered:
        text = f"{source}, {when}"
        return Answered(5, when, f"question {source}", text, "reference", 3, 0.1, source)

    both = [said(source, when) for when in ("before", "after") for source in (0, 1)]
    assert [(a.source, a.prompt, a.before, a.after) for a in answers_of(both)] == [
        (0, "question 0", "0, before", "0, after"),
        (1, "question 1", "1, before", "1, after"),
    ]
    shown = shown_in_full(answers_of(both))
    assert [one.title for one in shown] == ["Held-out row 6", "Held-out row 6 of source 2"]
