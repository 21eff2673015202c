"""Pickles and code, wherever a stranger may put them: none is read, and none goes off."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from safety_case import BOMB, CODE, EXECUTED, RECIPE, Bomb, halfbyte, refused


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_rows: Path
) -> Iterator[Path]:
    """A working directory with a model, rows and a recipe of two steps."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(tiny_rows, tmp_path / "rows.jsonl")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / EXECUTED).exists()


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_bomb_goes_off(place: Path) -> None:
    """Where it is unpickled; the tests below would show it."""
    for go in (lambda: pickle.loads(BOMB), lambda: exec(CODE)):
        go()
        (place / EXECUTED).rmdir()


def test_a_model_full_of_bombs_trains_and_answers(place: Path) -> None:
    """Everything beside the files that are read, and code that these name, stays what it is."""
    model = place / "model"
    for name in (
        *("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "vocab.pkl"),
        *("tokenizer.pkl", "adapter_model.bin", "model.pt", "tokenizer.model.pkl", "x.ckpt"),
    ):
        (model / name).write_bytes(BOMB)
    torch.save({"weight": Bomb()}, model / "pytorch_model-00001-of-00001.bin")
    (model / "custom_generate").mkdir()
    for name in (
        *("modeling_mine.py", "tokenization_mine.py", "configuration_mine.py", "__init__.py"),
        *("custom_generate/generate.py", "sitecustomize.py", "model.py", "transformers.py"),
    ):
        (model / name).write_text(CODE)
    code = {
        "AutoConfig": "configuration_mine.Mine",
        "AutoModelForCausalLM": "modeling_mine.Mine",
        "AutoTokenizer": ["tokenization_mine.Mine", "tokenization_mine.MineFast"],
    }
    change(
        model / "config.json",
        auto_map=code,
        _attn_implementation="mine/kernels",
        attn_implementation="mine/kernels",
    )
    change(model / "tokenizer_config.json", auto_map=code)
    (model / "generation_config.json").write_text('{"custom_generate": "mine/code"}')
    ended = halfbyte("train", "recipe.yaml", "--out", "run")
    assert ended.code == 0, ended.err
    (place / "run" / "adapter" / "adapter_model.bin").write_bytes(BOMB)
    for folder in (place / "run", place / "run" / "adapter", place / "run" / "checkpoints"):
        (folder / "training_args.bin").write_bytes(BOMB)
        (folder / "__init__.py").write_text(CODE)
    assert halfbyte("chat", "run").code == 0
    assert halfbyte("report", "run").code == 0
    assert not any(name.endswith("_mine") for name in sys.modules)


@pytest.mark.parametrize("terminal", [False, True])
def test_code_of_a_model_is_refused_without_a_question(
    place: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks a person at a terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    if terminal:
        monkeypatch.setattr("os.isatty", lambda _: True)
    code = {"AutoConfig": "mine.Mine", "AutoTokenizer": [None, "mine.Mine"]}
    (place / "model" / "mine.py").write_text(CODE)
    change(place / "model" / "tokenizer_config.json", auto_map=code, tokenizer_class="Mine")
    (place / "model" / "tokenizer.json").rename(place / "tokenizer.json")
    assert "tokenizer" in refused("data", "recipe.yaml")
    change(place / "model" / "config.json", model_type="mine", auto_map=code)
    assert "code of its own, which is never run" in refused("data", "recipe.yaml")


def test_a_tokenizer_written_in_python_is_not_made(place: Path) -> None:
    """Some start programs, or load a dictionary from wherever the files say."""
    change(
        place / "model" / "tokenizer_config.json",
        tokenizer_class="BertJapaneseTokenizer",
        word_tokenizer_type="mecab",
        mecab_kwargs={"mecab_option": "-r /nowhere"},
    )
    (place / "model" / "tokenizer.json").unlink()
    assert "BertJapaneseTokenizer" in refused("data", "recipe.yaml")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "x.ckpt"])
def test_pickled_weights_are_refused(place: Path, name: str) -> None:
    (place / "model" / "model.safetensors").rename(place / "model" / "moved")
    (place / "model" / name).write_bytes(BOMB)
    assert "pickled" in refused("train", "recipe.yaml")
    # Under the name of what is read it is damaged.
    shutil.copy(place / "model" / name, place / "model" / "model.safetensors")
    assert "model.safetensors is damaged" in refused("train", "recipe.yaml")
    shutil.copy(place / "model" / name, place / "model.gguf")
    assert "model.gguf is no" in refused("train", "recipe.yaml", "--model", "model.gguf")


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=True, rows=np.array([Bomb()], dtype=object))
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    return file.getvalue()


def test_pickled_rows_are_refused(place: Path) -> None:
    """Under their own names, and under those of what is read."""
    for content in (BOMB, npy(), npz()):
        for name in ("rows.npy", "rows.npz", "rows.pkl", "rows.pickle", "rows.pt", "rows.bin"):
            (place / name).write_bytes(content)
            assert "of no kind that is read" in refused(
                "data", "recipe.yaml", "--set", f"data.path={name}"
            )
        for name in (
            "a.json",
            "a.jsonl",
            "a.csv",
            "a.parquet",
            "a.arrow",
            "a.json.gz",
            "a.csv.zst",
        ):
            (place / name).write_bytes(content)
            assert name in refused("data", "recipe.yaml", "--set", f"data.path={name}")


def test_a_pickled_type_in_a_table_is_not_made(place: Path) -> None:
    """Arrow and Parquet name extension types, and pyarrow once unpickled those of Python."""
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    table = pyarrow.Table.from_pylist(rows)
    name, extension = b"ARROW:extension:name", b"ARROW:extension:metadata"
    field = table.schema.field(0).with_metadata({name: b"arrow.py_extension_type", extension: BOMB})
    table = table.cast(table.schema.set(0, field))
    table = table.replace_schema_metadata({b"pandas": BOMB, b"huggingface": BOMB})
    with pyarrow.ipc.new_file(place / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_stream(place / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    pyarrow.parquet.write_table(table, place / "rows.parquet")
    for file in ("file.arrow", "stream.arrow", "rows.parquet"):
        words = ["train", "recipe.yaml", "--dry-run", "--data", file]
        assert halfbyte(*words).code == 0


def test_folders_of_datasets(place: Path) -> None:
    """One with a script, and one that was saved and names a pickle, an address or a file above."""
    script = place / "mine"
    script.mkdir()
    (script / "mine.py").write_text(CODE)
    (script / "README.md").write_text(
        "---\nconfigs: [{config_name: default, data_files: x.pkl}]\n---\n"
    )
    assert "`datasets` did not save" in refused("data", "recipe.yaml", "--set", "data.path=mine")
    (script / "dataset_info.json").write_text("{}")
    (script / "rows.arrow").write_bytes(BOMB)
    for file in ("rows.arrow", "../rows.jsonl", "/etc/passwd", "http://127.0.0.1:9/a.arrow", ".."):
        state = {"_data_files": [{"filename": file}], "_format_type": "custom", "_split": None}
        (script / "state.json").write_text(json.dumps(state))
        assert "cannot be read" in refused("data", "recipe.yaml", "--set", "data.path=mine")
    (script / "state.json").unlink()
    (script / "dataset_dict.json").write_text('{"splits": ["../mine", "train"]}')
    assert "no file of its own folder" in refused("data", "recipe.yaml", "--set", "data.path=mine")


def test_a_pickled_adapter_and_state(place: Path) -> None:
    assert halfbyte("train", "recipe.yaml", "--out", "run", "--max-steps", "1").code == 0
    adapter = place / "run" / "adapter"
    weights = adapter / "adapter_model.safetensors"
    (adapter / "adapter_model.bin").write_bytes(BOMB)
    weights.rename(adapter / "moved")
    assert "is pickled" in refused("chat", "run")
    weights.write_bytes(BOMB)
    assert "is damaged" in refused("chat", "run")
    (adapter / "moved").replace(weights)
    with zipfile.ZipFile(adapter / "tokenizer.json", "w") as archive:
        archive.writestr("data.pkl", BOMB)
    assert halfbyte("chat", "run").code in (0, 2)
