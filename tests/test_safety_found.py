"""What `make fuzz` found: the inputs, made small, that ended in a traceback or a hang once."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli.units import visible
from halfbyte.errors import ModelError, RecipeError
from halfbyte.events import read_events
from halfbyte.model.plausible import require_plausible
from halfbyte.model.source import open_model, open_tokenizer
from halfbyte.plan.defaults import MOST_STEPS, bounded
from halfbyte.recipe.load import parse_recipe
from halfbyte.recipe.schema import ModelRecipe
from halfbyte.report import figures, make_report
from run_records import write_run
from safety_case import RECIPE


def record_line(folder: Path, kind: str, **values: object) -> int:
    """Change the first event of ``kind`` in the record; how many events are read before it less."""
    path = folder / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    at = next(n for n, line in enumerate(lines) if json.loads(line)["kind"] == kind)
    whole = len(list(read_events(folder)))
    lines[at] = json.dumps({**json.loads(lines[at]), **values})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return whole - len(list(read_events(folder)))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("audit", {"source": 0.5}),
        ("audit", {"rows_dropped": {"a": "many"}}),
        ("artifact", {"size_bytes": "a"}),
        ("step", {"step": 10**30}),
        ("step", {"loss": []}),
        ("step", {"time": 1e999}),
        ("step", {"time": -1}),
        ("model", {"lora_modules": [1]}),
    ],
)
def test_a_record_with_fields_of_other_kinds(
    tmp_path: Path, kind: str, values: dict[str, Any]
) -> None:
    """The line is passed over, as one that is cut, and the report is made."""
    folder = write_run(tmp_path / "run")
    if kind == "artifact":
        values = {"bytes": "a", "size": "a", "size_bytes": "a"}
    assert record_line(folder, kind, **values) == 1
    assert make_report(folder).html.exists()


def test_a_record_that_lacks_what_it_speaks_of(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    record_line(folder, "run_started", command=[])
    path = folder / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    steps = [n for n, line in enumerate(lines) if json.loads(line)["kind"] == "step"]
    path.write_text("\n".join(line for n, line in enumerate(lines) if n not in steps[:40]) + "\n")
    assert make_report(folder).html.exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1e308])
def test_any_figure_can_be_written(value: float) -> None:
    for write in (figures.duration, figures.size, figures.loss, figures.rate, figures.difference):
        assert write(value)
    assert figures.percentage(value, 1e-300)
    assert figures.percentage(1.0, value)


def model_with(tmp_path: Path, tiny_model: Path, file: str, **values: object) -> ModelRecipe:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return ModelRecipe(name=str(folder))


@pytest.mark.parametrize("value", ["a", True, [], float("nan"), -5])
def test_a_tokenizer_for_no_number_of_tokens(
    tmp_path: Path, tiny_model: Path, value: object
) -> None:
    model = model_with(tmp_path, tiny_model, "tokenizer_config.json", model_max_length=value)
    with pytest.raises(ModelError, match=r"model_max_length|cannot be read"):
        open_tokenizer(model)


@pytest.mark.parametrize("value", [{"a": 1}, [], 7, None])
def test_an_architecture_that_is_no_name(tmp_path: Path, tiny_model: Path, value: object) -> None:
    with pytest.raises(ModelError, match="does not know the architecture"):
        open_model(model_with(tmp_path, tiny_model, "config.json", model_type=value))


def test_a_number_too_long_to_write() -> None:
    with pytest.raises(ModelError, match="hidden_size = 1e400, which no model has"):
        require_plausible({"hidden_size": 10**400}, "config.json")
    with pytest.raises(ModelError, match="hidden_size = -1e400, which no model has"):
        require_plausible({"hidden_size": -(10**400)}, "config.json")


def test_more_steps_than_there_can_be() -> None:
    assert bounded("training.max_steps", MOST_STEPS) == MOST_STEPS
    with pytest.raises(RecipeError, match=r"training\.epochs asks for more than 100,000,000"):
        bounded("training.epochs", 10**400)
    with pytest.raises(RecipeError, match="not a number that a setting can take"):
        parse_recipe(RECIPE.replace("max_steps: 2", "max_steps: " + "1" * 31), "recipe.yaml")


def test_half_a_character_is_shown() -> None:
    assert visible("a\ud800b") == "a\\ud800b"
    assert visible("\U0001f600") == "\U0001f600"
