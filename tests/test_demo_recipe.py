"""The demo's recipe: one in the package, the same in recipes/, and what it makes of the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import ROOT
from halfbyte import Recipe
from halfbyte.data.prepare import Prepared, prepare

PACKAGE = ROOT / "src" / "halfbyte" / "demo" / "demo.yaml"
RECIPES = ROOT / "recipes" / "demo.yaml"


def test_both_recipes_are_the_same_one() -> None:
    """All but the way to the rows, line for line: a link would not survive every clone."""
    packaged, listed = (path.read_text().splitlines() for path in (PACKAGE, RECIPES))
    different = [(a, b) for a, b in zip(packaged, listed, strict=True) if a != b]
    assert [a.split(":")[0].strip() for a, _ in different] == ["path"]
    rows = [path.parent / Recipe.load(path).data.path for path in (PACKAGE, RECIPES)]
    assert rows[0].resolve() == rows[1].resolve()
    assert rows[0].is_file()


@pytest.fixture(scope="module")
def prepared(smollm2_gguf: Path) -> Prepared:
    """The rows as the demo trains them, with the model's own tokenizer."""
    from halfbyte.model.source import open_model

    recipe = Recipe.load(PACKAGE, [f"data.path={PACKAGE.parent / 'lighthouse.jsonl'}"])
    return prepare(recipe, open_model(recipe.model).tokenizer, 2048)


def test_held_out_rows_do_not_train(prepared: Prepared) -> None:
    trained = {row.row for row in prepared.train}
    held_out = {row.row for row in prepared.held_out}
    lines = (PACKAGE.parent / "lighthouse.jsonl").read_text().splitlines()
    assert len(held_out) == 24
    assert not trained & held_out
    assert trained | held_out == set(range(len(lines)))
    answers = {json.loads(lines[i])["output"] for i in trained}
    assert all(row.answer not in answers for row in prepared.held_out_rows)


def test_the_rows_are_trained_whole_and_few_enough(prepared: Prepared) -> None:
    """Nothing is cut, and no more tokens are trained than two cores manage in three minutes."""
    training = Recipe.load(PACKAGE).training
    assert prepared.audit.rows_shortened == 0
    assert not prepared.audit.rows_dropped
    assert prepared.warnings == []
    assert training.max_steps is not None
    rows = training.max_steps * int(training.batch_size) * int(training.gradient_accumulation)
    assert rows * prepared.audit.tokens / prepared.audit.rows_used <= 25_000
    assert prepared.audit.sample[-1][1], "the end of an answer is learned"
