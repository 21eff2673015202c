"""The captured step is the eager one bit for bit, whatever happens between steps."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpu_case import (
    BUCKETS,
    bucket_of,
    capture,
    different,
    made_up_batches,
    made_up_rows,
    make_step,
    put_back,
    recipe_of,
    save_small_llama,
    state_of,
    take,
    write_rows,
)
from halfbyte import Recipe, Run, train
from halfbyte.engine.step import TrainStep
from halfbyte.evaluate.held_out import held_out_loss
from halfbyte.events import read_events
from halfbyte.events.types import Choice, Event, Fallback, Step
from halfbyte.kernels.choice import ALL, ELEMENTWISE, Kernels
from halfbyte.run.determinism import deterministic

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_small_llama(folder)
    return folder


@pytest.fixture
def as_in_a_run() -> Iterator[None]:
    """A stream that can be captured, and PyTorch's deterministic kernels."""
    with deterministic(True), torch.cuda.stream(torch.cuda.Stream()):
        yield


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "kernels", "keep", "recompute"),
    [
        (torch.bfloat16, ALL, None, 0),
        (torch.bfloat16, ALL, 1, 2),
        (torch.float16, ALL, 0, 4),
        (torch.float16, ELEMENTWISE, None, 0),
    ],
    ids=["bf16", "bf16, one kept, two made again", "fp16, from NF4", "fp16, as on a T4"],
)
@pytest.mark.usefixtures("as_in_a_run")
def test_captured_is_eager(
    model: Path,
    dtype: torch.dtype,
    kernels: Kernels,
    keep: int | None,
    recompute: int,
    accumulation: int,
) -> None:
    """50 steps with dropout, and an evaluation of longer rows among them."""
    step = make_step(model, dtype, keep=keep, recompute=recompute, kernels=kernels)
    step.scaler.scale.fill_(1024.0 if dtype == torch.float16 else 1.0)
    batches = made_up_batches(accumulation)
    take(
        step, batches, range(1, 4)
    )  # so that moments, step count and scratch memory hold something
    before = state_of(step)
    generator = torch.cuda.get_rng_state()
    captured = capture(step, accumulation)
    # Warm-up and capture leave everything as it was.
    assert different(state_of(step), before) == []
    assert torch.equal(torch.cuda.get_rng_state(), generator)

    held_out = made_up_rows(6, 190, 400)
    evaluated = []

    def evaluate(number: int) -> None:
        if number % 20 == 0:
            evaluated.append(held_out_loss(step.model, held_out).loss)
            # What is free now is written over, lest somebody reads what was given back.
            for size in (2**8, 2**12, 2**16, 2**20):
                _ = [torch.full((size,), torch.nan, device="cuda") for _ in range(64)]

    numbers = range(4, 54)
    used = {bucket_of(batch) for number in numbers for batch in batches.step(number)}
    assert used == set(BUCKETS)
    found = take(captured, batches, numbers, evaluate)
    after = state_of(step)
    put_back(step, before)
    expected = take(step, batches, numbers, evaluate)
    assert found == expected
    assert different(state_of(step), after) == []
    assert evaluated[: len(evaluated) // 2] == evaluated[len(evaluated) // 2 :]
    # And it was training: nearly every step made an update, each with masks of its own.
    assert sum(updated for _, _, updated in found) > 45
    assert "parameters" in different(before, after)


@pytest.mark.usefixtures("as_in_a_run")
def test_masks_follow_from_the_step_in_a_graph(model: Path) -> None:
    """The same batch, weights and graph at another step: another mask; at the same: the same."""
    step = make_step(model, dropout=0.3)
    captured, batch = capture(step), made_up_batches(1).step(1)
    before = state_of(step)
    losses = []
    for number in (1, 2, 1):
        put_back(step, before)
        losses.append(captured(number, batch).read()[0])
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]


@pytest.mark.usefixtures("as_in_a_run")
def test_memory_and_graphs_stay_over_a_thousand_steps(model: Path) -> None:
    step = make_step(model)
    captured, batches = capture(step), made_up_batches(1)

    def used() -> tuple[int, int, int, int]:
        torch.cuda.synchronize()
        return (
            torch.cuda.memory_allocated(),
            torch.cuda.memory_reserved(),
            torch.cuda.memory_stats()["segment.all.allocated"],
            len(captured.graphs),
        )

    seen = {bucket_of(batch) for number in range(1, 51) for batch in batches.step(number)}
    assert seen == set(BUCKETS)
    take(captured, batches, range(1, 51))
    graphs, before = dict(captured.graphs), used()
    last = None
    for number in range(51, 1051):
        last = captured(number, batches.step(number))
        if number % 250 == 0:
            assert used() == before
    assert last is not None
    assert last.read()[2]
    assert used() == before
    assert captured.graphs == graphs


@pytest.mark.usefixtures("as_in_a_run")
def test_a_captured_step_that_overflows_is_left_out(model: Path) -> None:
    """Counted, with the scale halved and weights, moments and schedule held, all on the device."""
    step = make_step(model, torch.float16)
    step.scaler.scale.fill_(1024.0)
    captured, batches = capture(step), made_up_batches(1)
    captured(1, batches.step(1))
    start = state_of(step)
    step.scaler.scale.fill_(3e38)
    result = captured(2, batches.step(2))
    loss, norm, updated = result.read()
    assert not updated
    assert not torch.isfinite(torch.tensor(norm))
    assert torch.isfinite(torch.tensor(loss))
    assert step.scaler.scale == 1.5e38
    assert step.scaler.good_steps == 0
    assert step.optimizer.count == 1
    held = state_of(step)
    assert set(different(held, start)) <= {"scaler.scale", "scaler.good_steps"}
    # What follows is what would have followed had there been no second step: at its rate too.
    step.scaler.scale.fill_(1024.0)
    assert captured(3, batches.step(3)).read()[2]
    after = state_of(step)
    put_back(step, start)
    step(3, batches.step(3))
    found = {n: t for n, t in state_of(step).items() if n != "scaler.good_steps"}
    assert different(found, {n: after[n] for n in found}) == []
    assert step.optimizer.count == 2


def events(run: Run) -> list[Event]:
    return [record.event for record in read_events(run.folder)]


def times_captured(run: Run) -> int:
    """In how many of its processes a run was captured."""
    return sum(isinstance(e, Choice) and e.key == "captured" for e in events(run))


def told(run: Run) -> list[tuple[int, float, float]]:
    """Number, loss and gradient norm of each step."""
    return [(e.step, e.loss, e.grad_norm) for e in events(run) if isinstance(e, Step)]


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path)
    return path


@pytest.fixture(scope="module")
def whole(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """60 captured steps by the public function."""
    place = tmp_path_factory.mktemp("whole")
    run = train(Recipe.model_validate(recipe_of(model, rows, 60)), out=place / "run", runs=place)
    assert run.finished
    assert times_captured(run) == 1
    return run


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    whole: Run, model: Path, rows: Path, tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == 20:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = Recipe.model_validate(recipe_of(model, rows, 60))
    stopped = train(recipe, out=tmp_path / "run", runs=tmp_path, listeners=[interrupt])
    assert stopped.interrupted
    assert 20 <= stopped.step < 60  # losses are read some steps late
    finished = train(resume=tmp_path / "run", runs=tmp_path)
    assert finished.finished
    assert times_captured(finished) == 2
    assert told(finished) == told(whole)
    assert finished.held_out() == whole.held_out()
    assert different(adapter(finished), adapter(whole)) == []


def test_what_cannot_be_captured_falls_back(
    whole: Run, model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an event that says why, and the same numbers."""
    update = TrainStep.update

    def asks_the_host(self: TrainStep) -> None:
        assert self.loss.item() == self.loss.item()
        update(self)

    monkeypatch.setattr(TrainStep, "update", asks_the_host)
    recipe = Recipe.model_validate(recipe_of(model, rows, 60))
    run = train(recipe, out=tmp_path / "run", runs=tmp_path)
    assert run.finished
    assert times_captured(run) == 0
    reasons = [e.reason for e in events(run) if isinstance(e, Fallback) and "CUDA graph" in e.what]
    assert len(reasons) == 1
    assert "captur" in reasons[0]
    assert told(run) == told(whole)
    assert different(adapter(run), adapter(whole)) == []
    # The capture that failed leaves nothing behind that hinders the next run of the process, which
    # has shapes of its own, and so kernels to choose and graphs to make.
    monkeypatch.undo()
    other = Recipe.model_validate(recipe_of(model, rows, 20, batch_size=3))
    assert times_captured(train(other, out=tmp_path / "next", runs=tmp_path)) == 1


SCRIPT = """
import json, sys
from pathlib import Path
from halfbyte import Recipe, train
recipe, out = json.loads(sys.argv[1]), Path(sys.argv[2])
train(Recipe.model_validate(recipe), out=out, runs=out.parent)
"""


def test_two_processes_train_the_same_adapter(model: Path, rows: Path, tmp_path: Path) -> None:
    """200 steps each; the second one finds the first one's compiled kernels, and its choices."""
    recipe: dict[str, Any] = recipe_of(model, rows, 200)
    found = []
    for name in ("first", "second"):
        words = [sys.executable, "-c", SCRIPT, json.dumps(recipe), str(tmp_path / name)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        run = Run(tmp_path / name, interrupted=False, step=200)
        assert times_captured(run) == 1
        assert len(told(run)) == 200
        weights = (run.adapter / "adapter_model.safetensors").read_bytes()
        found.append((told(run), hashlib.sha256(weights).hexdigest()))
    assert found[0] == found[1]
