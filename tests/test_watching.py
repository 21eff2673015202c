"""Runs that go back, lower their rate or end early, against runs that are so by other means."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte.run.setup as setup
import halfbyte.run.training as training
from halfbyte import Recipe, Run, train
from halfbyte.checkpoint.files import checkpoints_in, load_checkpoint
from halfbyte.data.batch import Batch
from halfbyte.data.batching import Batches
from halfbyte.errors import DivergenceError, RunError
from halfbyte.events import read_events
from halfbyte.events.types import (
    Diverged,
    Evaluated,
    Event,
    Finished,
    Kept,
    Noticed,
    RateLowered,
    RolledBack,
    Step,
    StoppedEarly,
)
from halfbyte.model.causal import QLoRAModel

ROWS, PER_STEP, SEED = 128, 4, 42
STEPS = ROWS // PER_STEP
BAD = 22  # the step whose rows hold the letter
LETTER = "q"  # in no other row
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of which one has a letter, and a model that ``poison`` spoils for that letter."""
    shutil.copytree(tiny_model, tmp_path / "model")
    rows = [
        {"instruction": f"Say {n} in words.", "output": f"It is {'one ' * (n % 5 + 1)}and {n}."}
        for n in range(ROWS)
    ]
    rows[row_of(BAD)]["output"] = LETTER * 40
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def row_of(step: int) -> int:
    """A row of that step, by the order that the recipe's seed gives."""
    batches = Batches.__new__(Batches)
    batches.rows, batches.batch_size, batches.gradient_accumulation = range(ROWS), 2, 2  # type: ignore[assignment]
    batches.seed, batches.packs, batches._epoch = SEED, None, None
    return int(batches.positions(step)[1][0])


def poison(value: float) -> None:
    """The embedding of the letter is ``value`` wherever the head then says the letter is unlikely:
    NaN makes its loss NaN, any other number makes it some fifty nats."""
    path = Path("model", "model.safetensors")
    tokens = json.loads(Path("model", "tokenizer.json").read_text(encoding="utf-8"))
    at = tokens["model"]["vocab"][LETTER]
    weights = load_file(path)
    width = weights["model.embed_tokens.weight"].shape[1]
    pattern = torch.tensor([1.0, -1.0] * (width // 2))
    weights["model.embed_tokens.weight"][at] = value * pattern
    weights["lm_head.weight"][at] = -2.0 * pattern
    save_file(weights, path, metadata={"format": "pt"})


def asked(watch: dict[str, Any] | None = None, **more: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": {"name": "model"},
        "data": {"path": "rows.jsonl", "held_out": 0, "max_length": 128},
        "lora": {"r": 4, "lora_dropout": 0.1},
        "training": {
            "batch_size": 2,
            "gradient_accumulation": 2,
            "epochs": 1,
            "warmup_steps": 3,
            "learning_rate": 0.01,
        },
        "evaluation": {"prompts": 0, "base_loss": False},
        "checkpoints": {"every_steps": 8},
        "precision": "fp32",
        "seed": SEED,
        "watch": watch or {},
    }
    for key, value in more.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return Recipe.model_validate(values)


def of(folder: Path, kind: type[Event]) -> list[Any]:
    return [r.event for r in read_events(folder) if isinstance(r.event, kind)]


def last_state(folder: Path) -> dict[str, torch.Tensor]:
    """Adapter, optimizer and scaler after the last step."""
    return load_checkpoint(checkpoints_in(folder / "checkpoints")[-1])[1]


def same_bits(one: Path, other: Path) -> bool:
    first, second = last_state(one), last_state(other)
    assert first.keys() == second.keys()
    assert any("count" in name for name in first)
    weights = (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    return weights and all(torch.equal(first[name], second[name]) for name in first)


def never_had(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> Path:
    """A run in which the gradients of steps that are ``bad`` are not finite: the step on the device
    makes no update of them, and nothing of the batches is left."""
    loss_sum = QLoRAModel.loss_sum

    def changed(self: QLoRAModel, batch: Batch) -> torch.Tensor:
        loss = loss_sum(self, batch)
        assert self.position is not None
        if loss.requires_grad and bad(self.position.step):
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(QLoRAModel, "loss_sum", changed)
        return train(asked(), out="never", runs=Path("other")).folder


def interrupt_at(kind: type[Event], step: int) -> Callable[[Event], None]:
    """Ctrl-C when an event of that kind and step is told of."""

    def listen(event: Event) -> None:
        if type(event) is kind and event.step == step:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGINT)

    return listen


@pytest.mark.parametrize("lag", [0, 8])
@pytest.mark.parametrize(("what", "value"), [("loss_spike", 1.0), ("loss_not_finite", math.nan)])
def test_a_batch_left_out_leaves_no_trace(
    place: Path, monkeypatch: pytest.MonkeyPatch, what: str, value: float, lag: int
) -> None:
    poison(1.0)
    expected = never_had(monkeypatch, lambda step: step == BAD)
    poison(value)
    recipe = asked({what: "rollback"})
    monkeypatch.setattr(training, "lag_of", lambda assembly: lag)
    run = train(recipe, out="run", runs=place)
    assert run.finished
    assert same_bits(run.folder, expected)
    [noticed] = of(run.folder, Noticed)
    assert (noticed.name, noticed.step, noticed.action) == (what, BAD, "rollback")
    assert row_of(BAD) in noticed.rows
    [back] = of(run.folder, RolledBack)
    # The update of a loss that is NaN was not made: there is nothing to undo.
    assert (back.step, back.to) == (BAD, 16 if value == 1.0 else BAD)
    rates = {e.step: e.learning_rate for e in of(run.folder, Step)}
    assert rates == {e.step: e.learning_rate for e in of(expected, Step)}
    assert rates[BAD] == rates[BAD + 1]  # the schedule did not move
    made = of(run.folder, Step)
    assert len(made) == STEPS + (6 if value == 1.0 else 0)  # 17 to 21 again, and 22 passed over
    last = {e.step: e.loss for e in made if e.step != BAD}
    assert [pair for pair in run.losses() if pair[0] != BAD] == list(last.items())
    assert (BAD in dict(run.losses())) == (value != 1.0)
    assert run.step == STEPS
    if lag and value != 1.0:
        return
    # So it is where the run is interrupted before, and when the first step is made again.
    stopped = train(recipe, out="stopped", runs=place, listeners=[interrupt_at(Step, 18)])
    assert stopped.interrupted
    listeners = [interrupt_at(RolledBack, BAD)]
    again = train(resume=stopped.folder, runs=place, listeners=listeners)
    if lag == 0:  # with a lag, more is known by the time of the signal
        assert again.interrupted
        assert again.step == (19 if value == 1.0 else BAD)
    while again.interrupted:
        again = train(resume=stopped.folder, runs=place)
    assert again.finished
    assert same_bits(again.folder, expected)
    assert "was left out" in again.folder.joinpath("report.md").read_text(encoding="utf-8")


def test_what_is_noticed_without_an_action_changes_nothing(place: Path) -> None:
    """Beside what it says: the run is the one in which nothing is watched."""
    poison(1.0)
    run = train(asked(), out="run", runs=place)
    [noticed] = of(run.folder, Noticed)
    assert (noticed.name, noticed.step, noticed.action) == ("loss_spike", BAD, "say")
    assert [e.step for e in of(run.folder, Step)] == list(range(1, STEPS + 1))
    assert not of(run.folder, RolledBack)
    poison(math.nan)
    with pytest.raises(DivergenceError, match=rf"the loss of step {BAD} is NaN on rows .*, so "):
        train(asked(), out="nan", runs=place)


def test_a_spike_that_stops_a_run(place: Path) -> None:
    poison(1.0)
    with pytest.raises(DivergenceError) as caught:
        train(asked({"loss_spike": "stop"}), out="run", runs=place)
    text = str(caught.value)
    assert text.startswith(f"the loss of step {BAD} is ")
    assert (
        "so training stopped, as watch.loss_spike says; the last checkpoint is "
        "run/checkpoints/step-16; look at these rows"
    ) in text
    assert of(Path("run"), Diverged)[0].rows == of(Path("run"), Noticed)[0].rows
    # It goes on where somebody says so.
    recipe = asked({"loss_spike": "say"})
    allow = ["watch.loss_spike"]
    assert train(recipe, out="run", runs=place, resume="auto", allow=allow).finished


def test_going_back_has_an_end(place: Path) -> None:
    """Here after one batch; in the second epoch the letter comes again."""
    poison(math.inf)
    recipe = asked({"loss_not_finite": "rollback", "max_rollbacks": 1}, training={"epochs": 2})
    with pytest.raises(DivergenceError) as caught:
        train(recipe, out="run", runs=place)
    assert "one batch has been left out already, which is watch.max_rollbacks, so " in str(
        caught.value
    )
    assert [e.step for e in of(Path("run"), RolledBack)] == [BAD]
    assert of(Path("run"), Diverged)[0].step > STEPS


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_left_out_is_as_an_update_that_was_not_made(
    place: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """That of a loss that is NaN is left out on the device, in captured steps as well. Where there
    is no checkpoint yet the run goes back to its start, and eight steps more were made by then."""
    monkeypatch.setattr(training, "lag_of", lambda assembly: training.LAG)
    poison(math.nan)
    recipe = asked({"loss_not_finite": "say"}, device=device)
    expected = train(recipe, out="never", runs=Path("other")).folder
    assert [e.step for e in of(expected, Noticed)] == [BAD]
    poison(1.0)
    for every, to in ((8, 16), (1000, 0)):
        recipe = asked(
            {"loss_spike": "rollback"}, device=device, checkpoints={"every_steps": every}
        )
        run = train(recipe, out=f"run-{every}", runs=place)
        assert [(e.step, e.to) for e in of(run.folder, RolledBack)] == [(BAD, to)]
        assert same_bits(run.folder, expected)


@pytest.mark.parametrize("lag", [0, 8])
def test_a_lower_rate_holds_from_one_step_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    poison(1.0)
    recipe = asked({"loss_spike": "lower_rate", "rate_factor": 0.25})
    first = BAD + 1 + lag
    table = setup.schedule_table

    def lowered(*args: Any) -> torch.Tensor:
        rates = table(*args)
        rates[first - 1 :] *= 0.25
        return rates

    with monkeypatch.context() as patched:
        patched.setattr(setup, "schedule_table", lowered)
        expected = train(asked(), out="lowered", runs=Path("other")).folder
    monkeypatch.setattr(training, "lag_of", lambda assembly: lag)
    run = train(recipe, out="run", runs=place)
    [event] = of(run.folder, RateLowered)
    assert (event.step, event.first, event.factor) == (BAD, first, 0.25)
    assert same_bits(run.folder, expected)
    rates = [e.learning_rate for e in of(run.folder, Step)]
    assert rates == [e.learning_rate for e in of(expected, Step)]
    # It is interrupted where the spike is known and the rate not lower yet.
    listeners = [interrupt_at(RateLowered, BAD)]
    stopped = train(recipe, out="stopped", runs=place, listeners=listeners)
    assert stopped.interrupted
    again = train(resume=stopped.folder, runs=place)
    assert same_bits(again.folder, expected)


EARLY = {
    "data": {"held_out": 8},
    "evaluation": {"every_steps": 5, "early_stopping": {"patience": 2, "min_delta": 1e3}},
}


def test_a_run_that_ends_early_finishes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(1.0)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "end_run", killed)
        with pytest.raises(KeyboardInterrupt):
            train(asked(**EARLY), out="killed", runs=place)
    run = train(asked(**EARLY), out="run", runs=place)
    assert run.finished
    assert run.step == 15
    measured = {e.step: e.loss for e in of(run.folder, Evaluated) if e.what == "adapter"}
    [early] = of(run.folder, StoppedEarly)
    assert early == StoppedEarly(15, 2, 5, measured[5])  # none is lower by a thousand
    assert list(measured) == [5, 10, 15]
    best = min(measured, key=lambda step: measured[step])
    assert of(run.folder, Kept)[0].step == best
    assert best > 5  # so the adapter that is kept is the one with the lowest loss all the same
    assert of(run.folder, Finished)[0].step == 15
    assert "ended before step" in (run.folder / "report.md").read_text(encoding="utf-8")
    with pytest.raises(RunError, match="has finished"):
        train(resume=run.folder, runs=place)
    # A process that died after the last step goes on with what follows it, and not past it.
    again = train(resume=place / "killed", runs=place)
    assert again.finished
    assert [e.step for e in of(again.folder, Step)] == list(range(1, 16))
    assert same_bits(again.folder, run.folder)
    assert Run.make(again.folder, interrupted=False).step == 15
