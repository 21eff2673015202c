"""Files that halfbyte exports, loaded by llama.cpp itself: its tokens, its logits, its quantizer.

It runs in a process of its own, by a Python that has llama-cpp-python: this one, or the one that
HALFBYTE_LLAMA_PYTHON names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from command_line import halfbyte
from gguf_case import FAMILIES, TEXTS, Case, make_case
from halfbyte.export.agreement import Agreement, compare_logits
from halfbyte.export.gguf.llama_cpp import PYTHON, ask_llama_cpp, find_python
from halfbyte.model.source import open_model
from halfbyte.recipe.schema import ModelRecipe


@pytest.fixture(scope="module")
def python() -> str:
    found = find_python()
    if found is None:
        pytest.skip(f"no llama-cpp-python: install it, or set {PYTHON} to a Python that has it")
    return found


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def case(family: str) -> Case:
        if family not in made:
            made[family] = make_case(tmp_path_factory.mktemp(family), family)
        return made[family]

    return case


def logits(python: str, path: Path, case: Case, lora: Path | None = None) -> Agreement:
    """llama.cpp's beside PEFT's."""
    rows = [row[0].tolist() for row in case.ids]
    asked = ask_llama_cpp(python, path, [], rows, lora=lora)
    return compare_logits([torch.from_numpy(one) for one in asked.logits], case.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logits_are_pefts(
    python: str, cases: Callable[[str], Case], family: str, tmp_path: Path
) -> None:
    case, out = cases(family), tmp_path / "x.gguf"
    done = halfbyte("export", case.adapter, "--onto", "original", "--type", "f32", "--out", out)
    assert "llama.cpp" in done.stdout
    found = logits(python, out, case)
    assert found.kl < 1e-8
    assert found.top1 == 1.0
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["by_llama_cpp"]["different"] == 0
    assert record["by_llama_cpp"]["logits"]["kl"] < 1e-8
    if family == "mistral":
        return  # its texts begin otherwise where no template makes them, which is said
    tokens = ask_llama_cpp(python, out, TEXTS, []).tokens
    assert tokens == [case.tokenizer(text).input_ids for text in TEXTS]


def test_a_base_is_read_with_llama_cpps_tokens(python: str, smollm2_gguf: Path) -> None:
    texts = [
        *TEXTS,
        "1.\n2.\n\n 34\r\n",
        " 5",
        "x\n7",
        "² ４\t3",
        "<|im_start|>user\n12<|im_end|>\n",
        "",
    ]
    ours = open_model(ModelRecipe(name=str(smollm2_gguf))).tokenizer
    asked = ask_llama_cpp(python, smollm2_gguf, texts, [])
    assert asked.tokens == [ours(text)["input_ids"] for text in texts]


@pytest.mark.parametrize(("type", "most"), [("q8_0", 0.02), ("q4_k_m", 0.6), ("q6_k", 0.05)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_quantized(
    python: str,
    cases: Callable[[str], Case],
    family: str,
    type: str,
    most: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # by the binding, not by a program
    case, out = cases(family), tmp_path / "x.gguf"
    halfbyte("export", case.adapter, "--onto", "original", "--type", type, "--out", out)
    found = logits(python, out, case)
    assert 1e-6 < found.kl < most
    kinds = {t.tensor_type.name.lower() for t in gguf.GGUFReader(out).tensors}
    assert kinds & {"q8_0", "q4_k", "q6_k"}
    assert {p.name for p in tmp_path.iterdir()} == {"x.gguf", "x.json", "x.Modelfile"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_alone_on_its_base(
    python: str, cases: Callable[[str], Case], family: str, tmp_path: Path
) -> None:
    case = cases(family)
    base, lora = tmp_path / "base.gguf", tmp_path / "lora.gguf"
    halfbyte("export", case.model, "--type", "f32", "--out", base)
    done = halfbyte("export", case.adapter, "--to", "gguf-lora", "--out", lora)
    assert "--lora" in done.stdout
    assert logits(python, base, case).kl > 1e-3  # the adapter does something
    assert logits(python, base, case, lora).kl < 1e-8


def test_smollm2(python: str, smollm2_gguf: Path, tmp_path: Path) -> None:
    """A real vocabulary and real weights, written again out of the package's file."""
    folder = tmp_path / "model"
    source = open_model(ModelRecipe(name=str(smollm2_gguf)))
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(
        {name: source.read(name, torch.float32).contiguous() for name in source.names()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    source.config.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    out = tmp_path / "x.gguf"
    halfbyte("export", folder, "--type", "f16", "--out", out)
    record: dict[str, Any] = json.loads((tmp_path / "x.json").read_text())
    assert record["by_llama_cpp"]["different"] == 0
    assert record["by_llama_cpp"]["logits"]["top1"] > 0.99
    texts = [*TEXTS, "  two  spaces\n\n\n\n9876543210", "Ünïcödé — “quotes” …   "]
    tokens = ask_llama_cpp(python, out, texts, []).tokens
    assert tokens == [source.tokenizer(text).input_ids for text in texts]
    assert ask_llama_cpp(python, smollm2_gguf, texts, []).tokens == tokens


def test_a_file_that_llama_cpp_does_not_take(python: str, tmp_path: Path) -> None:
    from halfbyte.errors import ModelError

    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match=r"llama\.cpp does not take x\.gguf"):
        ask_llama_cpp(python, tmp_path / "x.gguf", ["a"], [])
