"""What is generated from the recipe's models is current, and is true of the recipes shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from halfbyte.recipe import Recipe
from halfbyte.recipe.reference import SCHEMA_FILE, SETTINGS_FILE, json_schema, write_reference
from halfbyte.recipe.settings import settings

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", [SETTINGS_FILE, SCHEMA_FILE])
def test_the_files_in_docs_are_current(name: str, tmp_path: Path) -> None:
    write_reference(tmp_path)
    made = (tmp_path / name).read_text(encoding="utf-8")
    there = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert made == there, "run python -m halfbyte.recipe.reference"


def test_the_reference_describes_every_setting() -> None:
    page = (ROOT / "docs" / SETTINGS_FILE).read_text(encoding="utf-8")
    for setting in settings().values():
        assert len(setting.description) > 10
        assert f"| `{setting.name}` | {setting.wanted} |" in page


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_load_and_fit_the_json_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    # dumped, because PyYAML alone reads 2e-4 as a text
    values = Recipe.load(path).model_dump(mode="json", exclude_unset=True)
    assert list(validator.iter_errors(values)) == []
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(values)


def test_the_json_schema_refuses_what_the_reader_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    good = {"model": {"name": "m"}, "data": {"path": "d"}, "training": None}
    assert validator.is_valid(good)
    for wrong in (
        {"lora_r": 8},
        {"training": {"epochs": 0}},
        {"training": {"optimizer": "sgd"}},
        {"lora": {"target_modules": []}},
        {"seed": "1"},
        {"model": {}},
    ):
        assert not validator.is_valid({**good, **wrong}), wrong
