"""Going on with a run: from which checkpoint, with which recipe, on which data and model."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import halfbyte
from halfbyte import Recipe, Run, train
from halfbyte.checkpoint.files import checkpoints_in
from halfbyte.checkpoint.manifest import check_manifest
from halfbyte.checkpoint.snapshot import HostCopies, Snapshot
from halfbyte.errors import HalfbyteError, RunError
from halfbyte.events import read_events
from halfbyte.events.types import Changed, Event, RunStarted, Step, Warned
from halfbyte.model.weight_hashes import WeightHashes
from halfbyte.run.changes import BY_NAME, changed_recipe

WEIGHTS = "adapter/adapter_model.safetensors"


def asked(model: Path, rows: Path, **training: object) -> Recipe:
    return Recipe.model_validate(
        {
            "device": "cpu",
            "model": {"name": str(model)},
            "data": {"path": str(rows), "held_out": 4},
            "lora": {"r": 4, "lora_dropout": 0.1},
            "training": {
                "batch_size": 2,
                "gradient_accumulation": 1,
                "max_steps": 6,
                "learning_rate": 1e-3,
                **training,
            },
            "evaluation": {"prompts": 0, "base_loss": False, "every_steps": 2},
            "checkpoints": {"every_steps": 1, "keep_last": 3},
        }
    )


def stopped_at(step: int, recipe: Recipe, folder: Path, number: int = signal.SIGINT) -> Run:
    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == step:
            os.kill(os.getpid(), number)

    return train(recipe, out=folder, runs=folder.parent, listeners=[interrupt])


@pytest.fixture(scope="module")
def begun(
    tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run that was stopped after step 4, and the same run never stopped."""
    place = tmp_path_factory.mktemp("begun")
    recipe = asked(tiny_model, tiny_rows)
    train(recipe, out=place / "whole", runs=place)
    stopped_at(4, recipe, place / "part")
    return {"whole": place / "whole", "part": place / "part"}


@pytest.fixture
def part(begun: dict[str, Path], tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(begun["part"], tmp_path / "run")
    return tmp_path / "run"


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def test_a_checkpoint_holds_all_that_a_run_goes_on_from(part: Path) -> None:
    (*_, last) = checkpoints_in(part / "checkpoints")
    assert last.name == "step-4"
    listed = json.loads((last / "manifest.json").read_text())["files"]
    assert {"state.safetensors", "state.json", "recipe.yaml", "recipe.asked.yaml"} < listed.keys()
    assert {"strategy.json", "events.jsonl"} < listed.keys()
    assert "best.safetensors" not in listed  # step 4 is the best
    third = json.loads((last.parent / "step-3" / "manifest.json").read_text())["files"]
    assert "best.safetensors" in third
    best = load_file(last.parent / "step-3" / "best.safetensors")
    second = load_file(last.parent / "step-2" / "state.safetensors")
    assert all(torch.equal(tensor, second[name]) for name, tensor in best.items())
    state = json.loads((last / "state.json").read_text())
    assert state["step"] == 4
    named = {"rows that train", "rows held out", "data", "model file model.safetensors"}
    assert named < state["hashes"].keys()
    # The record up to the step, by which a lost run folder is made again.
    steps = [r.event.step for r in read_events(last) if isinstance(r.event, Step)]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "longer"])
def test_damage_to_any_file_is_found_and_the_one_before_is_used(
    begun: dict[str, Path], part: Path, harm: str
) -> None:
    (*_, before, last) = checkpoints_in(part / "checkpoints")
    whole = part.parent / "whole"
    shutil.copytree(last, whole)
    for path in sorted(p for p in whole.rglob("*") if p.is_file()):
        name = path.relative_to(whole)
        shutil.rmtree(last)
        shutil.copytree(whole, last)
        raw = bytearray((last / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        match harm:
            case "flip":
                (last / name).write_bytes(raw)
            case "cut":
                (last / name).write_bytes(raw[:-1])
            case "longer":
                (last / name).write_bytes(path.read_bytes() + b" " * 7)
            case "gone":
                (last / name).unlink()
        if name.name == "manifest.json" and harm == "longer":
            check_manifest(last)  # white space behind a manifest is no harm
            continue
        with pytest.raises(RunError, match="damaged"):
            check_manifest(last)
    told: list[Event] = []
    (last / "state.safetensors").write_bytes(b"")
    finished = train(resume=part, runs=part.parent, listeners=[told.append])
    assert any("is damaged" in e.text for e in told if isinstance(e, Warned))
    (start,) = [e for e in told if isinstance(e, RunStarted)]
    assert start.resumed_from == int(before.name[5:])
    assert weights(finished.folder) == weights(begun["whole"])


def test_without_a_whole_checkpoint_it_is_an_error_and_without_any_it_begins_again(
    begun: dict[str, Path], part: Path
) -> None:
    for path in checkpoints_in(part / "checkpoints"):
        (path / "state.json").unlink()
    with pytest.raises(RunError, match=r"no checkpoint that is whole .*--overwrite"):
        train(resume=part, runs=part.parent)
    shutil.rmtree(part / "checkpoints")
    finished = train(resume=part, runs=part.parent)
    assert weights(finished.folder) == weights(begun["whole"])
    starts = [r.event for r in read_events(part) if isinstance(r.event, RunStarted)]
    assert [e.resumed_from for e in starts] == [None, 0]
    assert len({e.run_id for e in starts}) == 1


def test_what_a_killed_process_left_half_done_is_removed(part: Path) -> None:
    half = part / "checkpoints" / ".step-5.partial"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    (part / "checkpoints" / ".step-1.removed").mkdir()
    (part / ".report.md.1234.partial").write_bytes(b"half")
    (part / "plots" / ".loss.png.1234.partial").write_bytes(b"half")
    train(resume=part, runs=part.parent)
    assert not list(part.rglob(".*"))


def test_links_and_pipes_in_a_strangers_run_lead_nowhere(part: Path, tmp_path: Path) -> None:
    last = checkpoints_in(part / "checkpoints")[-1]
    (last / "strategy.json").unlink()
    os.mkfifo(last / "strategy.json")
    with pytest.raises(RunError, match=r"strategy\.json is no file"):
        check_manifest(last)
    (tmp_path / "elsewhere").mkdir()
    for name in ("adapter", "report.html"):
        (part / name).unlink(missing_ok=True)
        (part / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(RunError, match=rf"{name} is a link"):
            train(resume=part, runs=part.parent)
        (part / name).unlink()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_changed_recipe_is_refused_with_the_difference(part: Path) -> None:
    before = {p: p.read_bytes() for p in part.rglob("*") if p.is_file()}
    for change, words in [
        ("training.learning_rate=5e-4", []),
        ("lora.r=8", ["lora.r 4 → 8", "lora.r cannot change", "start a new run"]),
        ("training.batch_size=3", ["training.batch_size 2 → 3", "cannot change"]),
        ("quantization.block_size=128", ["quantization.block_size 64 → 128", "cannot change"]),
        ("seed=7", ["seed 42 → 7", "cannot change"]),
    ]:
        wanted = Recipe.load(part / "recipe.yaml", [change])
        with pytest.raises(RunError) as refused:
            train(wanted, resume=part, runs=part.parent)
        if not words:
            words = ["training.learning_rate 0.001 → 0.0005", "--allow training.learning_rate"]
        for word in words:
            assert word in str(refused.value)
    assert {p: p.read_bytes() for p in part.rglob("*") if p.is_file()} == before
    # The same by editing the run's own recipe.
    text = (part / "recipe.yaml").read_text()
    (part / "recipe.yaml").write_text(text.replace("learning_rate: 0.001", "learning_rate: 0.5"))
    with pytest.raises(RunError, match=r"learning_rate 0\.001 → 0\.5"):
        train(resume=part, runs=part.parent)
    with pytest.raises(RunError, match=r"--allow takes machine or a setting .* lora\.r is not"):
        train(resume=part, runs=part.parent, allow=["lora.r"])


def rates_of(folder: Path) -> dict[int, float]:
    events = [record.event for record in read_events(folder)]
    return {e.step: e.learning_rate for e in events if isinstance(e, Step)}


def test_what_is_allowed_by_name_changes_and_the_record_says_so(
    begun: dict[str, Path], part: Path
) -> None:
    told = halfbyte("train", "--resume", part, "--set", "training.learning_rate=1e-4")
    assert "training.learning_rate 0.001 → 0.0001" in " ".join(told.output.split())
    rates, before = rates_of(part), rates_of(begun["whole"])
    assert rates == pytest.approx({n: r if n <= 4 else 0.1 * r for n, r in before.items()})
    (changed,) = [r.event for r in read_events(part) if isinstance(r.event, Changed)]
    assert (changed.key, changed.before, changed.now) == (
        "training.learning_rate",
        "0.001",
        "0.0001",
    )
    assert "learning_rate: 0.0001" in (part / "recipe.yaml").read_text()
    report = (part / "report.md").read_text(encoding="utf-8")
    assert "training.learning_rate" in report


def _is_step(event: Event) -> bool:
    return isinstance(event, Step)


def test_consent_holds_for_the_next_time_too(part: Path) -> None:
    wanted = Recipe.load(part / "recipe.yaml", ["training.learning_rate=1e-4"])

    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == 5:
            raise KeyboardInterrupt  # before there is a checkpoint with the new rate

    with pytest.raises(KeyboardInterrupt):
        train(
            wanted,
            resume=part,
            allow=["training.learning_rate"],
            listeners=[interrupt],
            runs=part.parent,
        )
    for path in checkpoints_in(part / "checkpoints"):
        if path.name == "step-5":
            shutil.rmtree(path)
    assert train(resume=part, runs=part.parent).finished


def test_a_finished_run_goes_on_for_more_epochs(begun: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(begun["whole"], tmp_path / "run")
    told = halfbyte("train", "--resume", tmp_path / "run", code=2)
    assert "has finished" in told.output
    halfbyte("train", "--resume", tmp_path / "run", "--set", "training.max_steps=8")
    steps = [r.event.step for r in read_events(tmp_path / "run") if _is_step(r.event)]
    assert steps == list(range(1, 9))


def test_other_rows_or_another_model_are_refused_by_name(
    part: Path, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    rows, model = tmp_path / "rows.jsonl", tmp_path / "model"
    shutil.copy(tiny_rows, rows)
    shutil.copytree(tiny_model, model)
    text = (part / "recipe.yaml").read_text()
    text = text.replace(str(tiny_rows), str(rows)).replace(str(tiny_model), str(model))
    moved = tmp_path / "moved"
    shutil.copytree(part, moved)
    (moved / "recipe.yaml").write_text(text)
    changed = rows.read_text().replace("number 3 in", "number 30 in")
    rows.write_text(changed)
    with pytest.raises(RunError, match=r"rows that train .* data has changed \(SHA-256 .* then"):
        train(resume=moved, runs=tmp_path)
    shutil.copy(tiny_rows, rows)
    path = model / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(
        RunError, match=r"base model .* changed: model file model.safetensors \(SHA"
    ):
        train(resume=moved, runs=tmp_path)
    shutil.copy(tiny_model / "model.safetensors", path)
    # Data and model that lie elsewhere are the same ones.
    assert train(resume=moved, runs=tmp_path).finished


def test_the_same_command_again_begins_goes_on_and_ends(
    begun: dict[str, Path],
    tiny_model: Path,
    tiny_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from halfbyte.recipe.write import dump_recipe

    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(dump_recipe(asked(tiny_model, tiny_rows)))
    command = ["train", "r.yaml", "--resume", "auto"]
    halfbyte(*command, "--max-steps", "3")
    (first,) = [p for p in Path("runs").iterdir() if not p.is_symlink()]
    told = halfbyte(*command, "--allow", "training.max_steps")
    assert [p for p in Path("runs").iterdir() if not p.is_symlink()] == [first]
    assert "going on from the checkpoint of step 3" in " ".join(told.output.split())
    before = (first / "events.jsonl").read_bytes()
    halfbyte(*command)
    assert (first / "events.jsonl").read_bytes() == before
    # A finished run of another recipe is left alone.
    halfbyte(*command, "--set", "seed=7", "--max-steps", "1")
    assert len([p for p in Path("runs").iterdir() if not p.is_symlink()]) == 2


def test_sigterm_finishes_the_step_and_saves(
    begun: dict[str, Path], tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    run = stopped_at(3, asked(tiny_model, tiny_rows), tmp_path / "run", signal.SIGTERM)
    assert (run.interrupted, run.step, run.signal) == (True, 3, "SIGTERM")
    assert weights(train(resume=run.folder, runs=tmp_path).folder) == weights(begun["whole"])


def test_an_error_leaves_nobody_writing(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is let go only when the checkpoint that was being written is whole."""
    import halfbyte.checkpoint.writer as writer

    real = writer.save_checkpoint

    def slow(folder: Path, snapshot: Snapshot) -> Path:
        assert (folder.parent / "run.lock").exists()
        time.sleep(0.3)
        assert (folder.parent / "run.lock").exists()
        return real(folder, snapshot)

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            raise ZeroDivisionError

    monkeypatch.setattr(writer, "save_checkpoint", slow)
    with pytest.raises(ZeroDivisionError):
        train(asked(tiny_model, tiny_rows), out=tmp_path / "run", runs=tmp_path, listeners=[stop])
    assert [p.name for p in checkpoints_in(tmp_path / "run" / "checkpoints")] == ["step-1"]
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_step_draws_from_no_generator(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    """So that the step's number is the state of everything random."""
    states: list[tuple[bytes, object, bytes]] = []

    def look(event: Event) -> None:
        if isinstance(event, Step):
            drawn = np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]
            states.append((torch.get_rng_state().numpy().tobytes(), random.getstate(), drawn))

    train(asked(tiny_model, tiny_rows), out=tmp_path / "run", runs=tmp_path, listeners=[look])
    assert len(states) == 6
    assert all(state == states[0] for state in states)


def test_a_copy_is_equal_and_apart() -> None:
    flat = torch.arange(1000.0)
    tensors = {
        "a": flat[10:40].view(5, 6),
        "b": flat[40:1000],
        "t": torch.arange(12.0).view(3, 4).t(),
        "small": torch.zeros(10_000)[3:5],
        "codes": torch.arange(64, dtype=torch.uint8),
        "one": torch.tensor(2.5),
    }
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    copies = HostCopies().copy(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert copies.keys() == expected.keys()
    for name, tensor in expected.items():
        assert copies[name].dtype == tensor.dtype
        assert torch.equal(copies[name], tensor)
    assert copies["small"].untyped_storage().nbytes() < 100


def test_hashes_are_remembered_until_a_file_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    name = "model file model.safetensors"
    assert WeightHashes([path]).result() == {name: hashlib.sha256(b"one").hexdigest()}
    with monkeypatch.context() as without:
        without.setattr("halfbyte.model.weight_hashes.sha256_of", lambda path: "made again")
        assert WeightHashes([path]).result() == {name: hashlib.sha256(b"one").hexdigest()}
        time = path.stat().st_mtime_ns
        path.write_bytes(b"two")
        os.utime(path, ns=(time, time + 1))
        assert WeightHashes([path]).result() == {name: "made again"}
    assert WeightHashes([tmp_path / "gone"]).result() == {}


def test_every_setting_may_change_by_name_never_or_freely(tmp_path: Path) -> None:
    """Each setting alone: refused, allowed, or of no account; nothing is passed over."""
    base = Recipe.model_validate({"model": {"name": "m"}, "data": {"path": "d"}})
    other = {
        "training.learning_rate": 1.0,
        "training.epochs": 9,
        "lora.r": 64,
        "data.max_length": 77,
        "training.logging_steps": 3,
        "checkpoints.keep_last": 9,
        "title": "another",
        "evaluation.prompts": 1,
        "training.optimizer": "adamw",
    }
    outcomes = {}
    for key, value in other.items():
        wanted = Recipe.model_validate(_changed(base, key, value))
        try:
            _, changes = changed_recipe(tmp_path, base, wanted, ())
            outcomes[key] = [c.key for c in changes] == [key]
        except HalfbyteError:
            recipe, changes = changed_recipe(tmp_path, base, wanted, [key])
            assert recipe == wanted
            outcomes[key] = key in BY_NAME
            if key not in BY_NAME:
                outcomes[key] = None
    assert outcomes == {
        **dict.fromkeys(other, True),
        "lora.r": None,
        "data.max_length": None,
        "training.optimizer": None,
    }


def _changed(base: Recipe, key: str, value: object) -> dict[str, object]:
    tree = base.model_dump()
    *above, name = key.split(".")
    inner = tree
    for part in above:
        inner = inner[part]
    inner[name] = value
    return tree
