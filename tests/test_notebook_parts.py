"""The parts of a notebook that need no kernel: the table's figures, the token, the archive."""

from __future__ import annotations

import math
import os
import sys
import types
from pathlib import Path

import pytest

from halfbyte.errors import RunError
from halfbyte.events.types import (
    Checked,
    Evaluated,
    Event,
    Finished,
    Kept,
    RunStarted,
    Step,
    TrainingStarted,
    Warned,
)
from halfbyte.recipe import Recipe
from halfbyte.recipe.load import parse_recipe
from halfbyte.run import LossTable
from halfbyte.run.loss_table import table_html
from halfbyte.run.notebook import pack_run, report_html, take_colab_token

LOSSES = [4.0, 3.0, 2.5, math.nan, 1.0]


def recipe() -> Recipe:
    text = "{model: {name: m}, data: {path: d}, training: {logging_steps: 2}}"
    return parse_recipe(text, "recipe")


def step(number: int, loss: float) -> Step:
    return Step(
        number, number / 5, loss, 1e-3, 1.0, tokens=50, labels=20, seconds=0.5, memory_bytes=1
    )


def story() -> list[Event]:
    started = TrainingStarted(10, 2, 1, len(LOSSES), 5, 1.0, "cpu", "fp32")
    return [
        RunStarted("0", ["halfbyte"], "runs/<b>x-1"),
        Warned("a <script> in the data"),
        started,
        Evaluated(0, "quantized base", 5.0, 9, 3, 0.1),
        step(1, LOSSES[0]),
        step(2, LOSSES[1]),
        Evaluated(2, "adapter", 3.25, 9, 3, 0.1),
        step(3, LOSSES[2]),
        step(4, LOSSES[3]),
        step(5, LOSSES[4]),
        Evaluated(5, "adapter", 3.5, 9, 3, 0.1),
        Kept(2, "the lowest held-out loss", 3.25),
        Evaluated(0, "base", 4.75, 9, 3, 0.1),
        Checked("read again", False, "apart by 1"),
        Finished(5, 9.0),
    ]


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    table = LossTable(recipe())  # no notebook here
    for event in story():
        table(event)
    said = capsys.readouterr().out
    assert "step 2  epoch 0.40  loss 3.5000  100 tokens/s" in said
    assert "step 4  epoch 0.80  loss nan" in said
    assert "step 5  epoch 1.00  loss 1.0000" in said, "the last step is logged"
    assert "step 3 " not in said
    assert "held-out loss at step 0: 5.0000 (quantized base)" in said
    assert "before quantization: 4.7500" in said
    assert "FAILED: read again (apart by 1)" in said
    assert said.rstrip().endswith("finished 5 steps in 9 s")


def test_html_holds_the_same_and_obeys_nothing() -> None:
    table = LossTable(recipe(), plain=True)
    for event in story():
        table(event)
    text = table_html(table.losses)
    assert [line.step for line in table.losses.lines] == [0, 2, 4, 5]
    assert "<b>3.2500</b>" in text, "the lowest held-out loss stands out"
    assert "<b>3.5000</b>" not in text
    assert "nan" in text
    assert "<script>" not in text
    assert "<b>x-1" not in text
    assert 'value="5" max="5"' in text


def colab(monkeypatch: pytest.MonkeyPatch, secret: str | None, error: str | None = None) -> None:
    userdata = types.ModuleType("google.colab.userdata")
    errors = {n: type(n, (Exception,), {}) for n in ("SecretNotFoundError", "NotebookAccessError")}

    def get(name: str) -> str | None:
        assert name == "HF_TOKEN"
        if error:
            raise errors[error]
        return secret

    vars(userdata).update(errors, get=get)
    for name in ("google", "google.colab"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, userdata.__name__, userdata)


def test_the_token_is_taken_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    colab(monkeypatch, "hf_secret")
    said = take_colab_token()
    assert os.environ["HF_TOKEN"] == "hf_secret"
    assert "hf_secret" not in said
    colab(monkeypatch, "another")
    assert "environment" in take_colab_token()
    assert os.environ["HF_TOKEN"] == "hf_secret", "what is set stays"


@pytest.mark.parametrize("error", ["SecretNotFoundError", "NotebookAccessError", None])
def test_no_secret_is_no_error(monkeypatch: pytest.MonkeyPatch, error: str | None) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    colab(monkeypatch, None, error)
    assert "public models" in take_colab_token()
    assert not os.environ["HF_TOKEN"]


def test_the_archive_leaves_checkpoints_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for name in ("events.jsonl", "report.html", "adapter/a.json", "checkpoints/step-1/state"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('<p class="x">')
    import zipfile

    with zipfile.ZipFile(pack_run(folder)) as archive:
        assert archive.namelist() == ["run/adapter/a.json", "run/events.jsonl", "run/report.html"]
    assert 'srcdoc="&lt;p class=&quot;x&quot;&gt;"' in report_html(folder)
    with pytest.raises(RunError, match="holds no run"):
        pack_run(tmp_path)
