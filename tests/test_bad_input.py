"""Whatever a user can get wrong ends with one sentence, exit code 2 and nothing written."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from safety_case import Ended, halfbyte


def everything_in(folder: Path) -> dict[str, bytes | None]:
    """Every path below ``folder`` with what it holds, links not followed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def sentence(ended: Ended) -> str:
    """The one sentence of a refusal."""
    assert ended.code == 2, ended
    assert ended.err.startswith("halfbyte: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.rstrip().endswith("."), ended.err
    return ended.err.removeprefix("halfbyte: ").rstrip()


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_rows: Path
) -> Path:
    """A working directory with a model, rows and a recipe of four steps."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(tiny_rows, tmp_path / "rows.jsonl")
    (tmp_path / "recipe.yaml").write_text(
        "model: {name: ./model}\n"
        "data: {path: rows.jsonl, held_out: 4, max_length: 128}\n"
        "training: {batch_size: 4, gradient_accumulation: 1, max_steps: 4, logging_steps: 2}\n"
        "evaluation: {prompts: 1, max_new_tokens: 4, base_loss: false}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(place: Path, *words: object) -> str:
    """The sentence of a command that is refused and leaves ``place`` as it was."""
    before = everything_in(place)
    said = sentence(halfbyte(*words))
    assert everything_in(place) == before
    return said


# The recipe.


def test_a_recipe_that_is_missing(place: Path) -> None:
    assert "nowhere.yaml does not exist" in refused(place, "train", "nowhere.yaml")
    assert "nowhere.yaml does not exist" in refused(place, "recipe", "nowhere.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00model", "line 1"),
        (b"model: [", "line 1"),
        (b"", "is empty"),
        (b"- a\n- b\n", "a list"),
        (b"model: {name: ./model}\ndata: {path: rows.jsonl}\nlora:\n  rr: 8\n", "line 4"),
        (b"model: {name: ./model}\ndata: {path: rows.jsonl}\nlora_r: 8\n", "lora.r"),
        (b"model: {name: ./model}\ndata: {path: rows.jsonl}\nlora: {r: eight}\n", "line 3"),
        (b"model: {name: ./model}\ndata: {path: rows.jsonl}\nlora: {r: 0}\n", "line 3"),
        (b"model: {name: ./model}\n", "data.path"),
    ],
)
def test_a_recipe_that_cannot_be_read(place: Path, content: bytes, said: str) -> None:
    (place / "bad.yaml").write_bytes(content)
    told = refused(place, "train", "bad.yaml")
    assert "bad.yaml" in told
    assert said in told


def test_a_recipe_that_is_a_folder(place: Path) -> None:
    assert "is a folder" in refused(place, "train", "model")


def test_an_override_that_fits_nothing(place: Path) -> None:
    assert "lora.r" in refused(place, "train", "recipe.yaml", "--set", "lora_r=8")
    assert "--set" in refused(place, "train", "recipe.yaml", "--set", "lora.r")


def test_nothing_to_train(place: Path) -> None:
    assert "--data FILE" in refused(place, "train")
    assert "--data FILE" in refused(place, "train", "--model", "./model")


# The model.


def test_a_model_that_is_missing(place: Path) -> None:
    told = refused(place, "train", "recipe.yaml", "--model", "./no-such-folder")
    assert "./no-such-folder" in told


def test_a_model_folder_without_a_model(place: Path) -> None:
    (place / "empty").mkdir()
    assert "empty" in refused(place, "train", "recipe.yaml", "--model", "./empty")


def test_a_model_whose_files_are_damaged(place: Path) -> None:
    weights = place / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in refused(place, "train", "recipe.yaml")
    weights.write_bytes(whole)
    (place / "model" / "config.json").write_text('{"model_type": "llama", ')
    assert "config.json" in refused(place, "train", "recipe.yaml")
    (place / "model.gguf").write_bytes(b"GGUF but no more")
    assert "model.gguf" in refused(place, "train", "recipe.yaml", "--model", "model.gguf")


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_not_read(place: Path, name: str) -> None:
    (place / "model" / "model.safetensors").unlink()
    torch.save({"w": _Bomb()}, place / "model" / name)
    told = refused(place, "train", "recipe.yaml")
    assert "safetensors" in told
    assert name in told


def test_code_in_a_model_folder_is_not_executed(place: Path) -> None:
    config = json.loads((place / "model" / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (place / "model" / "config.json").write_text(json.dumps(config))
    (place / "model" / "mine.py").write_text("import os\nos.mkdir('executed')\n")
    assert "mine" in refused(place, "train", "recipe.yaml")


def test_a_target_module_that_the_model_lacks(place: Path) -> None:
    told = refused(place, "train", "recipe.yaml", "--set", "lora.target_modules=[q_proj, query]")
    assert "'query'" in told
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert name in told


# The rows.


def test_a_data_file_that_is_missing(place: Path) -> None:
    assert "./none.jsonl" in refused(place, "train", "recipe.yaml", "--data", "./none.jsonl")
    assert "none.csv" in refused(place, "init", "none.csv", "--out", "new.yaml")


def test_a_data_file_that_cannot_be_read(place: Path) -> None:
    (place / "rows.parquet").write_bytes(b"PAR1 and then nothing")
    assert "rows.parquet" in refused(place, "train", "recipe.yaml", "--data", "rows.parquet")
    (place / "folder").mkdir()
    assert "folder" in refused(place, "train", "recipe.yaml", "--data", "./folder")


def test_a_column_that_is_not_there(place: Path) -> None:
    told = refused(place, "train", "recipe.yaml", "--set", "data.columns.output=answer")
    assert "no column answer" in told
    for name in ("instruction", "input", "output"):
        assert name in told


def test_malformed_jsonl_names_the_line(place: Path) -> None:
    lines = (place / "rows.jsonl").read_text().splitlines()
    lines[6] = lines[6][:-5]
    (place / "rows.jsonl").write_text("\n".join(lines))
    assert "line 7" in refused(place, "train", "recipe.yaml")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.jsonl", ""),
        ("none.json", "[]"),
        ("none.csv", "instruction,input,output\n"),
        ("blank.jsonl", "\n\n"),
        ("unanswered.jsonl", '{"instruction": "Say it.", "output": ""}\n' * 20),
    ],
)
def test_no_rows_to_learn_from(place: Path, name: str, content: str) -> None:
    (place / name).write_text(content)
    assert name in refused(place, "train", "recipe.yaml", "--data", name)


# The run folder and its disk.


def test_a_folder_that_holds_a_finished_run(place: Path) -> None:
    assert halfbyte("train", "recipe.yaml", "--out", "done").code == 0
    (place / "done-2").mkdir()
    (place / "done" / "mine.txt").write_text("not halfbyte's")
    for more in ([], ["--dry-run"]):
        told = refused(place, "train", "recipe.yaml", "--out", "done", *more)
        assert "done already holds a finished run" in told
        assert "--out done-3" in told
        assert "--overwrite" in told
    # What is wrong with the new run must not cost the old one.
    refused(place, "train", "recipe.yaml", "--out", "done", "--overwrite", "--data", "./none.csv")
    first = everything_in(place / "done")
    words = ["train", "recipe.yaml", "--out", "done", "--overwrite", "--set", "seed=7"]
    assert halfbyte(*words).code == 0
    second = everything_in(place / "done")
    assert second.keys() == first.keys()
    assert second["mine.txt"] == b"not halfbyte's"
    weights = "adapter/adapter_model.safetensors"
    assert second[weights] != first[weights]
    assert "finished; there is nothing to go on with" in refused(place, "train", "--resume", "done")


def test_a_run_folder_that_cannot_be_made(place: Path) -> None:
    assert "is a file" in refused(place, "train", "recipe.yaml", "--out", "rows.jsonl")
    told = refused(place, "train", "recipe.yaml", "--out", "rows.jsonl/inside")
    assert "cannot be made" in told


RUN = ("holds no run", "does not exist")
ADAPTER = ("neither a run folder nor an adapter", "there is no folder")


@pytest.mark.parametrize(
    ("command", "other", "nothing"),
    [
        (["train", "--resume"], *RUN),
        (["report"], *RUN),
        (["chat"], *ADAPTER),
        (["evaluate"], *ADAPTER),
        (["compare"], *ADAPTER),
        (["merge", "--out", "merged"], *ADAPTER),
        (["reduce", "--rank", "2", "--out", "small"], *ADAPTER),
    ],
)
def test_no_run_to_go_on_with(place: Path, command: list[str], other: str, nothing: str) -> None:
    assert "no latest run" in refused(place, *command)
    assert other in refused(place, *command, "model")
    assert nothing in refused(place, *command, "nowhere")


def test_resume_takes_no_other_recipe(place: Path) -> None:
    told = refused(place, "train", "recipe.yaml", "--resume", "--max-steps", "1")
    assert "leave out RECIPE.yaml, --max-steps" in told
    assert "give it with --resume" in refused(place, "train", "recipe.yaml", "--allow", "machine")


def test_a_disk_that_is_too_full_to_begin(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    assert "1 MB free" in refused(place, "train", "recipe.yaml", "--out", "new")


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 200 MB of its own."""
    disk = place / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    gc.collect()  # a run that failed leaves cycles behind, one with the map of a checkpoint
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves ``leave`` bytes free, though checkpoints may be written beside it."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        while True:
            free = max(shutil.disk_usage(disk).free - leave, 1)
            try:
                os.posix_fallocate(file.fileno(), 0, free)
            except OSError as error:  # taken between the look and the call, which then took nothing
                if error.errno != errno.ENOSPC:
                    raise
                if free == 1:
                    break
            else:
                break
    return filler


@pytest.mark.parametrize("file", ["checkpoint", "record", "adapter"])
def test_a_disk_that_fills_up_while_it_runs(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    import halfbyte.checkpoint.writer as writer
    import halfbyte.run.ending as ending
    import halfbyte.run.watch as watch

    words = ["train", "recipe.yaml", "--set", "checkpoints.every_steps=1", "--out"]
    assert halfbyte(*words, "whole").code == 0

    filler: list[Path] = []
    real_save, real_note, real_keep = writer.save_checkpoint, watch.Watch.note_step, ending._keep

    def save(folder, snapshot):  # type: ignore[no-untyped-def]
        if snapshot.state.step == 3 and not filler:
            filler.append(fill(small_disk, 4096))
        return real_save(folder, snapshot)

    def note(self, step):  # type: ignore[no-untyped-def]
        if step.number == 3 and not filler:
            filler.append(fill(small_disk, 0))
            for _ in range(50):  # what is left of the record's last page
                real_note(self, step)
        real_note(self, step)

    def keep(*args):  # type: ignore[no-untyped-def]
        if not filler:
            filler.append(fill(small_disk, 4096))
        return real_keep(*args)

    if file == "checkpoint":
        monkeypatch.setattr(writer, "save_checkpoint", save)
    elif file == "record":
        monkeypatch.setattr(watch.Watch, "note_step", note)
    else:
        monkeypatch.setattr(ending, "_keep", keep)
    told = sentence(halfbyte(*words, small_disk / "run"))
    assert "is full" in told
    assert f"halfbyte train --resume {small_disk / 'run'}" in told
    assert not list((small_disk / "run").rglob("*partial*"))

    filler[0].unlink()
    monkeypatch.undo()
    monkeypatch.chdir(small_disk.parent)
    assert halfbyte("train", "--resume", small_disk / "run").code == 0
    weights = "adapter/adapter_model.safetensors"
    assert (small_disk / "run" / weights).read_bytes() == Path("whole", weights).read_bytes()


def test_a_write_that_finds_no_space(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    told = sentence(halfbyte("train", "recipe.yaml", "--out", "run"))
    assert "the disk of run is full" in told
    assert not list((place / "run").rglob("*partial*"))
