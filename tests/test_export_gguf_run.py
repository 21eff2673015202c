"""A run from its rows to a GGUF file, and what becomes of it on a full disk."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_case import refusal, train_run
from command_line import halfbyte
from go_template_case import go_render, ollama_data
from halfbyte.data.chat_render import ChatRender
from halfbyte.data.tokenize import tokenize_rows
from halfbyte.finished.found import find_adapter, open_base
from halfbyte.finished.rows import held_out_rows

NEW = ["<answer>", "</answer>"]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tokens that the base does not have, whose rows are trained."""
    folder = tmp_path_factory.mktemp("export") / "my run"
    system = "data.system=Count, and be brief."
    return train_run(folder, tiny_model, tiny_rows, f"model.new_tokens={json.dumps(NEW)}", system)


def test_a_run_with_new_tokens(run: Path) -> None:
    done = halfbyte("export", run, "--type", "f32")
    out = run / "export" / "my-run-f32.gguf"
    assert str(out) in done.stdout.replace("\n", "")
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["compared_on"]["rows"] == 5
    assert record["rows_in_other_tokens"] == 0
    assert record["with_the_adapter"]["kl"] < 1e-8
    tokenizer = AutoTokenizer.from_pretrained(out.parent, gguf_file=out.name)
    model = AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name)
    found = find_adapter(run)
    source = open_base(found)
    assert len(model.get_input_embeddings().weight) == source.config.vocab_size
    held_out = held_out_rows(found, source)
    for example in held_out.rows:
        # From the row to the file's tokens, and from its question through its chat template.
        [(_, segments)] = held_out.template.rows(example, "answer")
        ids = [row.input_ids.tolist() for row in tokenize_rows(source.tokenizer, [segments], [0])]
        text = "".join(segment.text for segment in segments)
        assert ids == [tokenizer(text, add_special_tokens=False).input_ids]
        asked = [{"role": "user", "content": held_out.template.question(example)}]
        chat = ChatRender(tokenizer.chat_template, tokenizer)
        assert chat([asked], generate=True) == [held_out.template.prompt(example)]
        # And through Ollama.
        modelfile = out.with_suffix(".Modelfile").read_text()
        template = modelfile.split('TEMPLATE """')[1].split('"""')[0]
        system = modelfile.split('SYSTEM "')[1].split('"')[0]
        assert go_render(template, ollama_data(asked, system)) == held_out.template.prompt(example)
    for token in NEW:
        [number] = tokenizer(token, add_special_tokens=False).input_ids
        assert number == source.tokenizer.convert_tokens_to_ids(token)
    assert "has trained embeddings" in refusal("export", run, "--to", "gguf-lora")


def test_a_program_quantizes(run: Path, tmp_path: Path) -> None:
    """llama-quantize in the place of the binding: here one that copies, so the check must see it
    through, and one that fails."""
    program = tmp_path / "llama-quantize"
    words = ("--type", "q6_k", "--out", tmp_path / "x.gguf", "--llama-quantize", program)
    program.write_text('#!/bin/sh\ncp "$1" "$2"\n')
    program.chmod(0o755)
    halfbyte("export", run, *words)
    assert json.loads((tmp_path / "x.json").read_text())["tensors"].keys() == {"f16", "f32"}
    for name in ("x.gguf", "x.json", "x.Modelfile"):
        (tmp_path / name).unlink()
    program.write_text("#!/bin/sh\necho it is too warm >&2\nexit 3\n")
    assert "could not write q6_k (it is too warm)" in refusal("export", run, *words)
    assert {path.name for path in tmp_path.iterdir()} == {"llama-quantize"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    gc.collect()
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_nothing(
    run: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import halfbyte.export.new_file as new_file

    out = small_disk / "x.gguf"
    assert "make room" in refusal("export", run, "--type", "f32", "--out", out)
    # The look beforehand finds room, and then there is none.
    monkeypatch.setattr(new_file, "_SPARE", -(1 << 40))
    (small_disk / "mine").write_bytes(b"x" * 900_000)
    assert "could not be written" in refusal("export", run, "--type", "f32", "--out", out)
    assert [path.name for path in small_disk.iterdir()] == ["mine"]
