"""The commands end to end, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from safetensors.torch import load_file

from command_line import halfbyte
from halfbyte.events import read_events
from halfbyte.events.types import Evaluated, Interrupted, RunStarted, Step, TrainingStarted
from halfbyte.recipe import Recipe

PICTURES = True  # are looked at here

RECIPE = """\
title: Numbers in words
author: A. Tester
objective: Say numbers in words.
model:
  name: ./model
data:
  path: rows.jsonl
  held_out: 4
  max_length: 128
training:
  learning_rate: 1e-2
  batch_size: 4
  gradient_accumulation: 1
  epochs: 2
  logging_steps: 4
evaluation:
  every_steps: 5
  prompts: 2
  max_new_tokens: 4
"""
STEPS = 10  # 20 rows, 4 a step, twice
WEIGHTS = "adapter/adapter_model.safetensors"


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_rows: Path
) -> Path:
    """A working directory with a model, rows and a recipe."""
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "rows.jsonl").symlink_to(tiny_rows)
    (tmp_path / "numbers.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_loads_no_model_library() -> None:
    """Every help text, in a process of its own, with the slow imports forbidden."""
    program = """
import sys
from typer.testing import CliRunner
from halfbyte.cli.app import app

names = [command.name or command.callback.__name__ for command in app.registered_commands]
assert set(names) == {
    "train", "init", "data", "recipe", "report", "status", "chat", "evaluate", "compare", "merge",
    "combine", "reduce", "export", "push", "demo", "doctor", "bench"
}, names
for words in ([], *([name] for name in names)):
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    assert "--help" in result.output
slow = {"torch", "transformers", "datasets", "matplotlib", "numpy", "rich.live", "safetensors"}
assert not slow & sys.modules.keys(), slow & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_version_and_wrong_words() -> None:
    import halfbyte as package

    assert halfbyte("--version").stdout == f"halfbyte {package.__version__}\n"
    assert "No such option" in halfbyte("train", "--lora-r", "8", code=2).output
    assert "No such command" in halfbyte("trian", code=2).output


def test_train_from_a_recipe(place: Path) -> None:
    shown = halfbyte("train", "numbers.yaml").output

    [folder] = [p for p in Path("runs").iterdir() if not p.is_symlink()]
    assert re.fullmatch(r"numbers-\d{4}-\d\d-\d\d-1", folder.name)
    assert Path("runs/latest").resolve() == folder.resolve()
    adapter = {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "base_chat_template.jinja",
        "README.md",
    }
    checkpoints = {
        f"checkpoints/step-{step}/{name}"
        for step in (5, 10)
        for name in ("state.safetensors", "state.json", "manifest.json")
    }
    others = {"recipe.yaml", "recipe.asked.yaml", "strategy.json", "events.jsonl"}
    checkpoints |= {f"checkpoints/step-{step}/{name}" for step in (5, 10) for name in others}
    others |= {"report.md", "report.html"}
    found = files_in(folder)
    plots = {name for name in found if name.startswith("plots/")}
    assert plots
    assert found - plots == {f"adapter/{name}" for name in adapter} | checkpoints | others
    assert (folder / "recipe.asked.yaml").read_text() == RECIPE

    # The screen and the record tell the same story, in this order.
    assert "\x1b" not in shown
    order = [
        f"run folder: {folder}",
        "24 rows read, 20 train, 4 held out",
        "sample: ",
        "chosen: lora.lora_alpha = 32",
        f"{STEPS} steps, 5 an epoch, 2 epochs",
        "held-out loss before training",
        f"step  4/{STEPS}",
        "held-out loss after step 5",
        f"step 10/{STEPS}",
        "asked: held-out row",
        "after: ",
        f"done: {STEPS} steps",
        f"adapter: {folder}/adapter",
        f"report: {folder}/report.html",
        f"next: halfbyte chat {folder}",
    ]
    at = [shown.find(words) for words in order]
    assert -1 not in at, dict(zip(order, at, strict=True))
    assert at == sorted(at)

    events = [record.event for record in read_events(folder)]
    losses = {e.step: e.loss for e in events if isinstance(e, Step)}
    assert list(losses) == list(range(1, STEPS + 1))
    logged = dict(re.findall(r"^step +(\d+)/10 .* loss ([0-9.]+) ", shown, re.MULTILINE))
    for last, first in ((4, 1), (8, 5), (10, 9)):
        mean = sum(losses[n] for n in range(first, last + 1)) / (last - first + 1)
        assert float(logged[str(last)]) == pytest.approx(mean, abs=5e-5)
    measured = [(e.step, e.what) for e in events if isinstance(e, Evaluated)]
    assert measured == [(0, "quantized base"), (5, "adapter"), (10, "adapter"), (0, "base")]

    again = halfbyte("train", "numbers.yaml", "--max-steps", "1").output
    assert f"run folder: {str(folder)[:-1]}2" in again
    assert Path("runs/latest").resolve().name.endswith("-2")


def test_a_dry_run_writes_nothing(place: Path) -> None:
    before = files_in(place)
    shown = halfbyte("train", "numbers.yaml", "--dry-run", "--set", "training.epochs=1").output
    assert files_in(place) == before
    assert not Path("runs").exists()
    assert "24 rows read, 20 train, 4 held out" in shown
    assert "5 steps of 4 rows" in shown
    assert "nothing was written" in shown


def test_without_a_recipe_the_run_holds_one(place: Path) -> None:
    words = ["--set", "training.epochs=1", "--set", "evaluation.prompts=0"]
    shown = halfbyte("train", "--model", "./model", "--data", "rows.jsonl", *words).output
    folder = next(Path("runs").glob("rows-*-1"))
    effective = Recipe.model_validate(yaml.safe_load((folder / "recipe.yaml").read_text()))
    assert effective.model.name == "./model"
    assert effective.data.path == "rows.jsonl"
    assert effective.training.epochs == 1
    assert effective.lora.lora_alpha == 32
    assert "training.learning_rate = 0.0002" in shown
    # The recipe that it holds trains the same again.
    halfbyte("train", folder / "recipe.yaml", "--out", "again")
    assert (Path("again") / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_overrides_win_over_the_file(place: Path) -> None:
    words = ["--set", "lora.r=2", "--set", "lora.target_modules=[q_proj, v_proj]"]
    halfbyte("train", "numbers.yaml", "--out", "run", "--max-steps", "2", *words)
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    a = load_file(f"run/{WEIGHTS}")
    assert {t.shape[0] for name, t in a.items() if "lora_A" in name} == {2}
    events = [record.event for record in read_events(Path("run"))]
    assert [e.steps for e in events if isinstance(e, TrainingStarted)] == [2]


def test_paths_are_found_beside_the_recipe_and_again_on_resume(
    place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    halfbyte("train", place / "numbers.yaml", "--out", "run")
    events = (elsewhere / "run" / "events.jsonl").read_text().splitlines()
    last = next(i for i, line in enumerate(events) if '"step-5"' in line or "step-5" in line)
    # As if the process had been killed after step 5.
    (elsewhere / "run" / "events.jsonl").write_text("\n".join(events[: last + 1]) + "\n")
    whole = (elsewhere / "run" / WEIGHTS).read_bytes()
    shutil.rmtree(elsewhere / "run" / "checkpoints" / "step-10")
    shutil.rmtree(elsewhere / "run" / "adapter")
    shown = halfbyte("train", "--resume", "run").output
    assert "going on from the checkpoint of step 5" in shown
    assert (elsewhere / "run" / WEIGHTS).read_bytes() == whole


def test_ctrl_c_saves_and_the_run_goes_on(place: Path) -> None:
    """A real process and a real signal; what comes out equals an uninterrupted run's."""
    command = [sys.executable, "-m", "halfbyte", "train", "numbers.yaml", "--set"]
    command += ["training.epochs=50", "--out", "run", "--set", "evaluation.every_steps=50"]
    command += ["--set", "precision=fp32"]  # of another process, which the fixtures do not reach
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    shown = ""
    for line in process.stdout:
        shown += line
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    out, errors = process.communicate(timeout=120)
    shown += out
    assert process.returncode == 130, errors
    assert "finishing this step, then saving a checkpoint" in shown
    assert "halfbyte train --resume run" in shown
    events = [record.event for record in read_events(Path("run"))]
    [stop] = [e for e in events if isinstance(e, Interrupted)]
    assert stop.signal == "SIGINT"
    assert max(e.step for e in events if isinstance(e, Step)) == stop.step
    assert (Path("run") / "checkpoints" / f"step-{stop.step}" / "state.json").exists()
    assert (Path("run") / "report.html").exists()
    assert not (Path("run") / "adapter").exists()

    # Without a folder: the latest. Then the same recipe in one go.
    assert f"after step {stop.step:,}" in shown
    shown = halfbyte("train", "--resume").output
    assert f"going on from the checkpoint of step {stop.step}" in shown
    assert "done: 250 steps" in shown
    events = [record.event for record in read_events(Path("run"))]
    assert [e.resumed_from for e in events if isinstance(e, RunStarted)] == [None, stop.step]
    steps = [e.step for e in events if isinstance(e, Step)]
    assert steps == list(range(1, 251))
    words = ["--set", "training.epochs=50", "--set", "evaluation.every_steps=50"]
    halfbyte("train", "numbers.yaml", "--out", "whole", *words)
    assert (Path("run") / WEIGHTS).read_bytes() == (Path("whole") / WEIGHTS).read_bytes()


def test_ctrl_c_outside_the_steps(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import halfbyte.run.training as training

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = files_in(place)
    with monkeypatch.context() as patch:
        patch.setattr(training, "load_model", interrupted)
        assert "nothing was written" in halfbyte("train", "numbers.yaml", code=130).output
    assert files_in(place) == before
    assert not Path("runs").exists()
    # After the last step, while the adapter is saved and prompts are answered: nothing is lost.
    with monkeypatch.context() as patch:
        patch.setattr(training, "end_run", interrupted)
        shown = halfbyte("train", "numbers.yaml", "--out", "run", code=130).output
    assert "go on: halfbyte train --resume run" in shown
    assert "going on from the checkpoint of step 10" in halfbyte("train", "--resume", "run").output
    assert (Path("run") / WEIGHTS).exists()


@pytest.mark.parametrize("words", [["recipe", "--schema"], ["train", "--help"], ["--version"]])
def test_a_reader_that_went_away_gets_no_traceback(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "halfbyte", *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


def test_init_then_train(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "Frage;Antwort\n" + "".join(
        f'"Was ist {n} + 1?";"Es ist\n{n + 1}, möchte ich meinen."\n' for n in range(12)
    )
    Path("meine.csv").write_text(rows, encoding="cp1252")
    words = ["init", "meine.csv", "--model", "./model", "--out", "meine.yaml"]
    shown = halfbyte(*words).output
    assert "Frage" in shown
    assert "Was ist 0 + 1?" in shown
    assert "möchte ich meinen" in shown
    assert "halfbyte train meine.yaml" in shown
    text = Path("meine.yaml").read_text(encoding="utf-8")
    assert text.lstrip().startswith("#")
    recipe = Recipe.model_validate(yaml.safe_load(text))
    assert recipe.data.columns.instruction == "Frage"
    assert recipe.data.columns.output == "Antwort"
    # What is there is not written over.
    assert "meine.yaml exists" in halfbyte(*words, code=2).stderr
    assert Path("meine.yaml").read_text(encoding="utf-8") == text
    halfbyte("train", "meine.yaml", "--out", "run", "--max-steps", "1")
    assert (Path("run") / WEIGHTS).exists()


def test_recipe_gives_each_chosen_value_its_reason(place: Path) -> None:
    shown = halfbyte("recipe", "numbers.yaml", "--set", "lora.r=4").output
    lines = {
        line.split(" = ")[0]: line.split(" = ", 1)[1]
        for line in shown.splitlines()
        if " = " in line
    }
    assert lines["lora.r"].startswith("4")
    assert lines["lora.lora_alpha"].startswith("8")
    assert lines["training.learning_rate"].startswith("0.01")
    every = {
        f"{section}.{key}" if section else key
        for section, keys in _settings().items()
        for key in keys
    }
    assert every <= lines.keys()
    assert lines["precision"].split()[0] in ("fp32", "bf16", "fp16")
    assert len(lines["precision"].split()) > 3  # a reason follows
    # Where the model is not at hand, what does not depend on it is still told.
    shown = halfbyte("recipe", "numbers.yaml", "--set", "model.name=somebody/something").output
    assert "somebody/something" in shown
    assert "data.max_length" in shown


def _settings() -> dict[str, list[str]]:
    dumped = Recipe.model_validate({"model": {"name": "m"}, "data": {"path": "d"}}).model_dump()
    found = {"": [k for k, v in dumped.items() if not isinstance(v, dict)]}
    for section, values in dumped.items():
        if isinstance(values, dict):
            found[section] = [k for k, v in values.items() if not isinstance(v, dict)]
    return found


def test_the_schema_knows_what_the_recipe_knows() -> None:
    schema = json.loads(halfbyte("recipe", "--schema").stdout)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False


def test_report_again_and_of_several_runs(place: Path) -> None:
    for name, rate in (("one", "1e-3"), ("two", "1e-2")):
        words = ["--max-steps", "3", "--set", f"training.learning_rate={rate}"]
        halfbyte("train", "numbers.yaml", "--out", name, *words)
    first = (Path("one") / "report.html").read_bytes()
    for name in ("report.html", "report.md"):
        (Path("one") / name).unlink()
    assert "one/report.html" in halfbyte("report", "one").stdout
    assert (Path("one") / "report.html").read_bytes() == first
    shown = halfbyte("report").stdout  # the latest
    assert "two/report.html" in shown
    compared = halfbyte("report", "one", "two").stdout
    paths = [Path(word) for word in compared.split() if Path(word).suffix in (".html", ".md")]
    assert paths
    assert all(path.exists() for path in paths)


def test_demo_trains_the_rows_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    """The recipe and rows that are shipped, on a tiny model in place of the real one."""
    import halfbyte.cli.demo as demo

    shipped = demo.demo_recipe()
    recipe = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    rows = shipped.parent / recipe["data"]["path"]
    assert rows.exists()
    recipe["model"]["name"] = str(tiny_model)
    recipe["data"]["path"] = str(rows)
    recipe["data"]["max_length"] = 512  # its tokens are bytes, and a row must hold its end
    recipe.setdefault("evaluation", {})["max_new_tokens"] = 4
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(demo, "demo_recipe", lambda: tmp_path / "demo.yaml")
    monkeypatch.chdir(tmp_path)
    shown = halfbyte("demo", "--max-steps", "2").output
    assert shown.count("before: ") == 2
    assert shown.count("after: ") == 2
    [folder] = [p for p in Path("runs").iterdir() if not p.is_symlink()]
    for said in (
        f"{folder}/adapter",
        f"{folder}/report.html",
        f"halfbyte chat {folder}",
        "halfbyte init my.csv",
    ):
        assert said in shown


def test_no_option_is_named_by_its_placeholder() -> None:
    """typer 0.27 calls an option without a name of its own --TYPE if its placeholder is TYPE."""
    from typer.models import OptionInfo

    from halfbyte.cli.app import app

    commands = {command.callback for command in app.registered_commands}
    assert len(commands) > 10
    for command in commands:
        assert command is not None
        for name, hint in get_type_hints(command, include_extras=True).items():
            options = [o for o in getattr(hint, "__metadata__", ()) if isinstance(o, OptionInfo)]
            for option in options:
                placeholder = option.metavar or ""
                named = option.default == f"--{name}"  # the first word, until typer has read it
                assert named or placeholder.lower() != name, f"{command.__name__} --{name}"
