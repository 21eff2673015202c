"""A run on a GPU that was killed, stopped or moved goes on; its checkpoints are of their step."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpu_case import different, recipe_of, save_small_llama, write_rows
from halfbyte import Recipe, Run, train
from halfbyte.errors import RunError
from halfbyte.events import read_events
from halfbyte.events.types import Environment, Event, RunStarted, Step, TrainingStarted
from halfbyte.plan.device import PROXY

pytestmark = pytest.mark.gpu

STEPS = 60
PROCESS = """
import json, sys
from pathlib import Path
from halfbyte import Recipe, train
recipe = Recipe.model_validate(json.loads(Path(sys.argv[1]).read_text()))
train(recipe, out=sys.argv[2], runs=Path(sys.argv[2]).parent, resume="auto")
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    place = tmp_path_factory.mktemp("asked")
    save_small_llama(place / "model")
    write_rows(place / "rows.jsonl")
    recipe = Recipe.model_validate(recipe_of(place / "model", place / "rows.jsonl", STEPS))
    recipe.checkpoints.every_steps = 5
    return recipe


@pytest.fixture(scope="module")
def whole(asked: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("whole")
    return train(asked, out=place / "run", runs=place)


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_it_goes_on_to_the_same_adapter(
    whole: Run, asked: Recipe, tmp_path: Path, seed: int
) -> None:
    generator = random.Random(seed)
    (tmp_path / "recipe.json").write_text(asked.model_dump_json())
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "recipe.json"), str(tmp_path / "run")]
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # From the first steps on, which is where there is something to lose.
        record, step = tmp_path / "run" / "events.jsonl", generator.randrange(STEPS)
        while process.poll() is None and (
            not record.exists() or f'"step": {step}' not in record.read_text(errors="replace")
        ):
            time.sleep(0.005)
        time.sleep(0.05 * generator.random())
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True)
    assert kills > 0
    assert weights(tmp_path / "run") == weights(whole.folder)


def test_checkpoints_written_beside_the_steps_are_of_their_step(
    whole: Run, asked: Recipe, tmp_path: Path
) -> None:
    """One after every step, so that each is written while others go on, and one after every 7."""
    often, seldom = asked.model_copy(deep=True), asked.model_copy(deep=True)
    for recipe, every in ((often, 1), (seldom, 7)):
        recipe.checkpoints.every_steps = every
        recipe.checkpoints.keep_last = 100
        recipe.evaluation.every_steps = 0
        train(recipe, out=tmp_path / str(every), runs=tmp_path)
    names = {path.name for path in (tmp_path / "7" / "checkpoints").iterdir()}
    assert len(names) == STEPS // 7 + 1
    for name in names:
        one, other = (
            load_file(tmp_path / every / "checkpoints" / name / "state.safetensors")
            for every in ("1", "7")
        )
        assert different(one, other) == []
    assert weights(tmp_path / "1") == weights(whole.folder)


def test_a_step_draws_from_no_generator_of_the_gpu(asked: Recipe, tmp_path: Path) -> None:
    states: list[bytes] = []

    def look(event: Event) -> None:
        if isinstance(event, Step):
            states.append(torch.cuda.get_rng_state().numpy().tobytes())

    train(asked, out=tmp_path / "run", runs=tmp_path, max_steps=12, listeners=[look])
    assert len(states) == 12
    assert len(set(states)) == 1


def test_begun_on_another_gpu_it_goes_on_with_consent_and_in_its_precision(
    asked: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = asked.model_copy(deep=True)
    recipe.precision = "auto"

    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as older:
        older.setenv(PROXY, "t4")
        stopped = train(recipe, out=tmp_path / "run", runs=tmp_path, listeners=[interrupt])
    assert (stopped.interrupted, stopped.signal) == (True, "SIGTERM")
    with pytest.raises(RunError, match=r"began on .* in place of a T4 .*--allow machine"):
        train(resume=stopped.folder, runs=tmp_path)
    finished = train(resume=stopped.folder, runs=tmp_path, allow=["machine"])
    assert finished.finished
    events = [record.event for record in read_events(finished.folder)]
    assert [e.precision for e in events if isinstance(e, TrainingStarted)] == ["fp16", "fp16"]
    starts = [e.resumed_from for e in events if isinstance(e, RunStarted)]
    assert starts == [None, stopped.step]
    assert len({e.gpu for e in events if isinstance(e, Environment)}) == 2
    text = (finished.folder / "report.md").read_text(encoding="utf-8")
    assert "in place of a T4" in text
    assert "stopped by SIGTERM after step" in text
    assert "not be bit for bit" in text or "decided anew" in text
