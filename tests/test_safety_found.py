"""What `make fuzz` found: the inputs, made small, that ended in a traceback or a hang once."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from halfbyte.cli.units import visible
from halfbyte.data.batch import Bucket
from halfbyte.errors import ModelError, RecipeError, gave_up
from halfbyte.events import read_events
from halfbyte.model.plausible import require_plausible
from halfbyte.model.source import open_model, open_tokenizer
from halfbyte.plan.defaults import MOST_STEPS, bounded
from halfbyte.recipe.load import parse_recipe
from halfbyte.recipe.schema import ModelRecipe
from halfbyte.report import figures, make_report
from halfbyte.run.strategy import Strategy, read_strategy
from run_records import write_run
from safety_case import RECIPE, refused


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


def test_a_tokenizer_that_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_rows: Path
) -> None:
    """An expression of tokenizer.json that takes for ever: what is raised is no Exception."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUST_BACKTRACE", "0")
    shutil.copytree(tiny_model, "model")
    path = Path("model/tokenizer.json")
    read = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated"}
    steps = [{**split, "invert": False}, read["pre_tokenizer"]]
    read["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    path.write_text(json.dumps(read))
    rows = tiny_rows.read_text().replace("It is", "a" * 40)
    Path("rows.jsonl").write_text(rows)
    Path("recipe.yaml").write_text(RECIPE)
    assert "the model's tokenizer gives up on" in refused("data", "recipe.yaml")
    with pytest.raises(BaseException, match="retry-limit") as raised:
        PreTrainedTokenizerFast.from_pretrained("model")("a" * 40)
    assert gave_up(raised.value)
    assert not gave_up(KeyboardInterrupt())


def test_a_sentencepiece_file_with_a_long_piece(tmp_path: Path, tiny_model: Path) -> None:
    """Each piece is tried at every cut; SentencePiece itself takes pieces of 65,535 bytes."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    for text in (*kinds, "a", "b", "a" * 2000):
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = text, 0.0, kinds.get(text, 1)
    model.trainer_spec.model_type = 2
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="a piece of over 1000 characters"):
        open_tokenizer(ModelRecipe(name=str(folder)))


def test_a_name_that_no_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a" * 5000, "a/" * 3000):
        Path("recipe.yaml").write_text(RECIPE.replace("rows.jsonl", name))
        assert "is no name that a file can have" in refused("data", "recipe.yaml")
        assert "is no name that a file can have" in refused("report", name)
    Path("one").symlink_to("two")
    Path("two").symlink_to("one")
    Path("recipe.yaml").write_text(RECIPE.replace("rows.jsonl", "one/rows.jsonl"))
    refused("data", "recipe.yaml")


@pytest.mark.parametrize(
    "values",
    [{"kernels": []}, {"kernels": {"attention": 1}}, {"buckets": [{}]}, {"versions": None}, {}],
)
def test_a_strategy_of_other_kinds_is_none(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "strategy.json"
    whole = Strategy("cpu", {"torch": "2"}, 0, 0, {}, {}, [Bucket(8, 4, 8)], False, True)
    whole.write(tmp_path)
    assert read_strategy(tmp_path) == whole
    path.write_text(json.dumps({**json.loads(path.read_text()), **values} if values else []))
    assert read_strategy(tmp_path) is None


def test_a_recipe_as_asked_for_that_is_no_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    asked = folder / "recipe.asked.yaml"
    asked.write_bytes(asked.read_bytes().replace(b"Harbour", b"Harb\xffur"))
    assert "Harbour" in make_report(folder).markdown.read_text()  # as the effective one says
