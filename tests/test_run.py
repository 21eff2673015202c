"""Whole runs: repeatable, resumable, keeping the best, and the shipped recipe as it stands."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte import Recipe, Run, train
from halfbyte.evaluate.held_out import HeldOutLoss
from halfbyte.events import read_events
from halfbyte.events.types import Audited, Checked, Evaluated, Event, Kept, ModelLoaded, Step
from halfbyte.quant.linear import QLoRALinear

PICTURES = True  # whole runs, as users have them

ROOT = Path(__file__).resolve().parent.parent


def recipe(model: Path, rows: Path, **training: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": str(model)},
            "data": {"path": str(rows), "held_out": 4},
            "lora": {"r": 4, "lora_dropout": 0.1},
            "training": {"batch_size": 2, "gradient_accumulation": 2, "epochs": 2, **training},
            "evaluation": {"every_steps": 2, "prompts": 0, "base_loss": False},
        }
    )


def events(run: Run) -> list[Event]:
    return [record.event for record in read_events(run.folder)]


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten steps of four rows, with dropout, accumulation and 8-bit state."""
    place = tmp_path_factory.mktemp("whole")
    return train(recipe(tiny_model, tiny_rows), out=place / "run", runs=place)


def test_a_finished_run_holds_no_model(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    """In a notebook the next run, or the chat, needs the memory of this one."""

    def layers() -> int:
        gc.collect()
        return sum(isinstance(o, QLoRALinear) for o in gc.get_objects())

    before = layers()
    asked = recipe(tiny_model, tiny_rows, max_steps=2, gradient_checkpointing=True)
    train(asked, out=tmp_path / "run", runs=tmp_path)
    assert layers() == before


def test_the_same_seed_gives_the_same_bits(
    whole: Run, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    again = train(recipe(tiny_model, tiny_rows), out=tmp_path / "run", runs=tmp_path)
    assert len(whole.losses()) == 10
    assert again.losses() == whole.losses()
    assert again.held_out() == whole.held_out()
    assert same(adapter(again), adapter(whole))
    asked = recipe(tiny_model, tiny_rows)
    asked.seed = 43
    other = train(asked, out=tmp_path / "other", runs=tmp_path)
    assert not same(adapter(other), adapter(whole))


@pytest.mark.parametrize("step", [3, 4, 7])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    whole: Run, tiny_model: Path, tiny_rows: Path, tmp_path: Path, step: int
) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    asked = recipe(tiny_model, tiny_rows)
    stopped = train(asked, out=tmp_path / "run", runs=tmp_path, listeners=[interrupt])
    assert stopped.interrupted
    assert stopped.step == step
    assert not stopped.adapter.exists()
    assert stopped.report.exists()
    finished = train(resume=tmp_path / "run", runs=tmp_path)
    assert finished.finished
    assert finished.losses() == whole.losses()
    assert finished.held_out() == whole.held_out()
    assert same(adapter(finished), adapter(whole))


def test_the_adapter_with_the_lowest_held_out_loss_is_kept(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is measured is made up, since a model this small gets better to the end.
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.0, 3.2] * 2)
    monkeypatch.setattr(
        "halfbyte.run.watch.held_out_loss", lambda *_, **__: HeldOutLoss(next(losses), 10, 4)
    )
    asked = recipe(tiny_model, tiny_rows)
    run = train(asked, out=tmp_path / "run", runs=tmp_path)
    measured = {e.step: e.loss for e in events(run) if isinstance(e, Evaluated) and e.step > 0}
    assert measured == {2: 4.0, 4: 3.0, 6: 3.5, 8: 3.0, 10: 3.2}
    kept = next(e for e in events(run) if isinstance(e, Kept))
    assert (kept.step, kept.held_out_loss) == (4, 3.0)
    # The last two checkpoints and the best are on disk.
    assert {p.name for p in (run.folder / "checkpoints").iterdir()} == {
        "step-4",
        "step-8",
        "step-10",
    }
    saved = load_file(run.folder / f"checkpoints/step-{kept.step}/state.safetensors")
    by_name = {n: t for n, t in saved.items() if n.startswith("adapter.")}
    ours = adapter(run)
    assert len(ours) == len(by_name)
    for name, tensor in by_name.items():
        layer, _, matrix = name.removeprefix("adapter.").rpartition(".")
        assert torch.equal(ours[f"base_model.model.{layer}.{matrix}.weight"], tensor)
    assert {e.name for e in events(run) if isinstance(e, Checked) and not e.passed} == set()

    asked.evaluation.keep = "last"
    last = train(asked, out=tmp_path / "last", runs=tmp_path)
    assert next(e for e in events(last) if isinstance(e, Kept)).step == max(measured)
    assert not same(adapter(last), ours)


def test_the_tinyllama_recipe_as_it_stands(tiny_model: Path, tmp_path: Path) -> None:
    """All of its 375 steps, on a small model and 700 made-up rows."""
    words = random.Random(0)
    some = ["cough", "fever", "rest", "drink", "water", "see a doctor", "pain", "at night"]
    rows = [
        {
            "instruction": "Not used: the recipe has one of its own.",
            "input": " ".join(words.choices(some, k=words.randint(3, 12))),
            "output": " ".join(words.choices(some, k=words.randint(3, 12))),
        }
        for _ in range(700)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    changes = [f"model.name={tiny_model}", f"data.path={path}", "evaluation.prompts=1"]
    # The bf16 that the recipe states takes four times as long where a CPU only emulates it.
    changes.append("precision=fp32")
    asked = Recipe.load(ROOT / "recipes" / "tinyllama-chatdoctor.yaml", changes)
    run = train(asked, out=tmp_path / "run", runs=tmp_path)

    happened = events(run)
    audit = next(e for e in happened if isinstance(e, Audited))
    assert (audit.rows_used, audit.rows_held_out) == (500, 100)
    steps = [e for e in happened if isinstance(e, Step)]
    assert len(steps) == 375
    rates = [e.learning_rate for e in steps]
    assert rates[0] == pytest.approx(2e-4)
    assert rates == sorted(rates, reverse=True)
    model = next(e for e in happened if isinstance(e, ModelLoaded))
    assert model.lora_modules == dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj"], 2)
    assert next(e for e in happened if isinstance(e, Kept)).step == 375
    # The loss table shows the mean of the ten steps before each that the recipe names.
    report = (run.folder / "report.md").read_text(encoding="utf-8")
    for step in (10, 50, 100, 200, 300, 370):
        mean = sum(e.loss for e in steps[step - 10 : step]) / 10
        row = next(line for line in report.splitlines() if line.startswith(f"| {step} |"))
        assert f"{mean:.4f}" in row
    assert "nothing is really paged" in report
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
