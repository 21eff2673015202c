"""A loss that is no number ends a run with its rows named; an update left out does not."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import halfbyte.run.training as training
from halfbyte import Recipe, Run, train
from halfbyte.checkpoint.files import load_checkpoint
from halfbyte.cli.app import app
from halfbyte.data.batch import Batch, TokenizedRow
from halfbyte.data.batching import Batches
from halfbyte.engine.scaler import LossScaler
from halfbyte.errors import DivergenceError
from halfbyte.events import read_events
from halfbyte.events.types import Diverged, Event, Noticed, Step
from halfbyte.loop.steps import FinishedStep
from halfbyte.model.causal import QLoRAModel
from halfbyte.run.divergence import SKIPS_IN_A_ROW, SkippedSteps, named_rows, sentence
from halfbyte.run.loss_table import Losses
from halfbyte.run.setup import Trainer

ROWS, PER_STEP, SEED = 24, 4, 42
STEP = 4  # whose rows hold the letter
LETTER = "q"  # in no other row; its embedding is made NaN
WEIGHTS = "adapter/adapter_model.safetensors"


def rows_of_step(number: int) -> list[int]:
    nothing = TokenizedRow(np.zeros(2, np.int32), np.ones(2, bool), 0)
    batches = Batches([nothing] * ROWS, PER_STEP, 1, SEED)
    return [int(at) for part in batches.positions(number) for at in part]


@pytest.fixture
def place(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A model whose embedding of one letter is NaN, and rows of which one has the letter."""
    shutil.copytree(tiny_model, tmp_path / "model")
    rows = [json.loads(line) for line in tiny_rows.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == ROWS
    assert not any(LETTER in json.dumps(row) for row in rows)
    rows[rows_of_step(STEP)[1]]["input"] = f"{LETTER} is a letter."
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    poison(tmp_path, math.nan)
    (tmp_path / "recipe.yaml").write_text(json.dumps(asked()), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def poison(place: Path, value: float) -> None:
    tokens = json.loads((place / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    path = place / "model" / "model.safetensors"
    weights = load_file(path)
    embedding = weights["model.embed_tokens.weight"]
    embedding[tokens["model"]["vocab"][LETTER]] = value
    save_file(weights, path, metadata={"format": "pt"})


def asked(precision: str = "fp32", **more: Any) -> dict[str, Any]:
    return {
        "model": {"name": "model"},
        "data": {"path": "rows.jsonl", "held_out": 0, "max_length": 128},
        "lora": {"r": 4, "lora_dropout": 0.1},
        "training": {"batch_size": 2, "gradient_accumulation": 2, "epochs": 2, "warmup_steps": 3}
        | more,
        "evaluation": {"prompts": 0, "base_loss": False},
        "checkpoints": {"every_steps": 2},
        "precision": precision,
        "seed": SEED,
    }


def halfbyte(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def events(folder: Path) -> list[Event]:
    return [record.event for record in read_events(folder)]


def steps(folder: Path) -> list[Step]:
    return [event for event in events(folder) if isinstance(event, Step)]


def test_a_run_stops_with_one_sentence_and_does_not_go_on_with_another_model(place: Path) -> None:
    code, out, err = halfbyte("train", "recipe.yaml", "--out", "run")
    assert code == 2
    numbers = sorted(row + 1 for row in rows_of_step(STEP))
    named = f"rows {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
    assert err == (
        f"halfbyte: the loss of step {STEP} is NaN on {named}, so training stopped without that "
        "update; the last good checkpoint is run/checkpoints/step-2; look at these rows, or start "
        "again with a lower training.learning_rate.\n"
    )
    assert "Traceback" not in out
    happened = events(Path("run"))
    diverged = next(event for event in happened if isinstance(event, Diverged))
    assert sorted(diverged.rows) == [number - 1 for number in numbers]
    assert (diverged.step, diverged.checkpoint) == (STEP, "checkpoints/step-2")
    losses = [step.loss for step in steps(Path("run"))]
    assert [math.isfinite(loss) for loss in losses] == [True] * (STEP - 1) + [False]
    assert steps(Path("run"))[-1].skipped
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step-2"]
    assert not Path("run/adapter").exists()
    assert diverged.reason in Path("run/report.md").read_text(encoding="utf-8")

    # The run repeats itself as long as what is wrong is there; a mended model is another one.
    again = halfbyte("train", "--resume", "run")
    assert (again[0], again[2]) == (code, err)
    poison(place, 0.0)
    code, _, err = halfbyte("train", "--resume", "run")
    assert code == 2
    assert "its base model model has changed: model file model.safetensors" in err


def test_rows_of_several_sources_are_named_with_their_own(place: Path) -> None:
    """Each row is known by what it says, wherever the mix has put it."""
    lines = Path("rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    parts = {"a.jsonl": lines[:10], "b.jsonl": lines[10:16], "c.jsonl": lines[16:]}
    for name, part in parts.items():
        Path(name).write_text("".join(part), encoding="utf-8")
    bad = next((n, at) for n, p in parts.items() for at, line in enumerate(p, 1) if LETTER in line)
    values = asked(batch_size=8, gradient_accumulation=2, epochs=1)
    values["data"] = {"sources": [{"path": name} for name in parts], "held_out": 0}
    with pytest.raises(DivergenceError) as caught:
        train(Recipe.model_validate(values), out="run", runs=place)
    event = next(e for e in events(Path("run")) if isinstance(e, Diverged))
    named: dict[str, tuple[int, ...]] = dict.fromkeys(parts, ())
    for source, row in zip(event.sources, event.rows, strict=True):
        named[list(parts)[source]] += (row + 1,)
    assert bad[1] in named[bad[0]]
    assert all(at <= len(parts[name]) for name, rows in named.items() for at in rows)
    assert (
        sum(map(len, named.values())) == len(set(zip(event.sources, event.rows, strict=True))) > 8
    )
    # The first eight, by source.
    said, left = [], 8
    for name, rows in named.items():
        if shown := list(map(str, sorted(rows)[:left])):
            numbers = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
            said.append(f"row{'s' * (len(shown) > 1)} {numbers} of {name}")
        left -= len(shown)
    said.append(f"{sum(map(len, named.values())) - 8} more")
    assert len(said) > 2
    words = f"{', '.join(said[:-1])} and {said[-1]}"
    assert f" is NaN on {words}, so training stopped" in str(caught.value)


def test_a_source_that_is_named_twice_has_its_number() -> None:
    paths = ["a.jsonl", "hub/set", "hub/set"]
    assert named_rows([4, 0, 9], [2, 1, 1], paths) == (
        "rows 1 and 10 of hub/set (source 2) and row 5 of hub/set (source 3)"
    )
    assert named_rows(range(9), [0] * 9, paths) == (
        "rows 1, 2, 3, 4, 5, 6, 7, 8 and 1 more of a.jsonl"
    )
    assert named_rows([6], [0], paths) == "row 7 of a.jsonl"


def test_under_loss_scaling_such_a_step_is_left_out(place: Path) -> None:
    run = train(Recipe.model_validate(asked("fp16")), out="run", runs=place)
    assert run.finished
    done = steps(run.folder)
    assert len(done) == 12
    bad = [step.step for step in done if step.skipped]
    assert bad[0] == STEP
    assert len(bad) == 2  # once in each epoch
    assert [step.step for step in done if not math.isfinite(step.loss)] == bad
    assert not any(isinstance(event, Diverged) for event in events(run.folder))
    assert all(tensor.isfinite().all() for tensor in load_file(run.folder / WEIGHTS).values())
    report = (run.folder / "report.md").read_text(encoding="utf-8")
    assert re.search(r"2\supdates left out while the loss scale was found", report)
    state, _ = load_checkpoint(run.folder / "checkpoints" / "step-12")
    assert state.skipped == 2


def overflow(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Let the gradient, and not the loss, be infinite in the steps that are ``bad``."""
    loss_sum = QLoRAModel.loss_sum

    def changed(self: QLoRAModel, batch: Batch) -> torch.Tensor:
        loss = loss_sum(self, batch)
        assert self.position is not None
        if loss.requires_grad and bad(self.position.step):
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(QLoRAModel, "loss_sum", changed)


def test_an_update_left_out_does_not_move_the_schedule(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(place, 0.0)
    recipe = Recipe.model_validate(asked())
    rates = [s.learning_rate for s in steps(train(recipe, out="plain", runs=place).folder)]
    assert len(set(rates)) > 6
    overflow(monkeypatch, lambda step: step in (3, 7))

    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = train(recipe, out="run", runs=place, listeners=[interrupt])
    assert stopped.interrupted
    path = stopped.folder / "checkpoints" / "step-5"
    state, _ = load_checkpoint(path)
    assert state.skipped == 1
    run = train(resume=stopped.folder, runs=place)
    assert run.finished
    done = steps(run.folder)
    assert [step.step for step in done if step.skipped] == [3, 7]
    expected = [*rates[:3], *rates[2:6], *rates[5:10]]
    assert [step.learning_rate for step in done] == expected
    noticed = [(e.name, e.step) for e in events(run.folder) if isinstance(e, Noticed)]
    assert noticed == [("gradient_not_finite", 3), ("gradient_not_finite", 7)]


def test_gradients_that_are_never_finite_again_end_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(place, 0.0)
    overflow(monkeypatch, lambda step: step > 3)
    with pytest.raises(DivergenceError, match=r"gradient of step 23, of rows .*, is the 20th"):
        train(Recipe.model_validate(asked(epochs=9)), out="run", runs=place)
    assert len(steps(Path("run"))) == 23


def test_no_checkpoint_is_made_of_weights_that_are_not_finite(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(place, 0.0)
    made: list[Trainer] = []
    right = training.make_trainer

    def make_trainer(*args: Any) -> Trainer:
        made.append(right(*args))
        return made[-1]

    monkeypatch.setattr(training, "make_trainer", make_trainer)

    def spoil(event: Event) -> None:
        if isinstance(event, Step) and event.step == 4:
            made[0].parameters.data[5] = math.inf

    with pytest.raises(DivergenceError) as caught:
        train(Recipe.model_validate(asked()), out="run", runs=place, listeners=[spoil])
    assert str(caught.value) == (
        "the adapter is no longer finite after step 4, so training stopped; the last good "
        "checkpoint is run/checkpoints/step-2; start again with a lower training.learning_rate."
    )
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-2"]
    assert Run.make(Path("run"), interrupted=True).step == 4


def told(number: int, loss: float, updated: bool, rows: int = 3) -> FinishedStep:
    return FinishedStep(number, loss, 1.0, updated, 10, 5, 0.1, tuple(range(rows)))


def noted(scaler: LossScaler, told_of: list[tuple[float, bool]]) -> tuple[int, str] | None:
    """The step after which there is no going on, and why; the scaler moves as in training."""
    skipped = SkippedSteps(scaler, lambda step: named_rows(step.rows))
    for number, (loss, updated) in enumerate(told_of, 1):
        scaler.update(torch.tensor(updated))
        reason = skipped.note(told(number, loss, updated))
        assert skipped.count == sum(not made for _, made in told_of[:number])
        if reason is not None:
            return number, reason
    return None


GOOD, OVERFLOW, NAN = (2.0, True), (2.0, False), (math.nan, False)


@pytest.mark.parametrize(
    ("scaled", "steps", "end"),
    [
        (False, [GOOD, NAN], 2),
        (False, [GOOD, (math.inf, True)], 2),
        (False, [*[OVERFLOW] * 19, GOOD] * 3, None),
        (False, [GOOD, *[OVERFLOW] * 30], 1 + SKIPS_IN_A_ROW),
        (True, [*[NAN] * 15, GOOD] * 1, None),
        (True, [GOOD, *[NAN] * 30], 17),  # 2^16 has been halved to 1
        (True, [*[NAN] * 10, GOOD, *[NAN] * 10], 17),
        (True, [*[OVERFLOW] * 19, GOOD, *[OVERFLOW] * 19], None),
        (True, [GOOD, *[OVERFLOW] * 30], 1 + SKIPS_IN_A_ROW),
        (True, [GOOD, (math.nan, True)], 2),  # no smaller scale would have left it out
    ],
)
def test_when_there_is_no_going_on(
    scaled: bool, steps: list[tuple[float, bool]], end: int | None
) -> None:
    found = noted(LossScaler(scaled, torch.device("cpu")), steps)
    assert (found and found[0]) == end


def test_the_sentence_names_eight_rows_at_most() -> None:
    scaler = LossScaler(False, torch.device("cpu"))
    skipped = SkippedSteps(scaler, lambda step: named_rows(step.rows))
    for rows, words in ((1, "row 1"), (2, "rows 1 and 2"), (11, "rows 1, 2, 3, 4, 5, 6, 7, 8 and")):
        reason = skipped.note(told(1234, -math.inf, False, rows))
        assert reason is not None
        assert reason.startswith(f"the loss of step 1,234 is infinite on {words}")
        assert reason.endswith("and 3 more") == (rows == 11)
        text = sentence(reason, None, updated=False, scaled=True)
        assert "; there is no checkpoint; " in text
        assert text.endswith("start again with a lower training.learning_rate or in fp32.")
    table = Losses(10)
    table.take(Diverged(1, reason, [0]))
    assert table.status == f"stopped: {reason}"
