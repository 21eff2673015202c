"""``halfbyte export --to gguf``, beside PEFT and transformers' own reader of GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import halfbyte.export.gguf.architecture as gguf_architecture
from command_line import halfbyte
from gguf_case import FAMILIES, TEXTS, Case, make_case
from halfbyte.errors import ModelError
from halfbyte.export.agreement import compare_logits
from halfbyte.export.gguf.types import weight_type


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def case(family: str) -> Case:
        if family not in made:
            made[family] = make_case(tmp_path_factory.mktemp(family), family)
        return made[family]

    return case


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HALFBYTE_LLAMA_PYTHON", raising=False)


def theirs(path: Path, case: Case) -> list[Tensor]:
    """Logits of the file by transformers, which dequantizes all of it.

    Of Llama's settings it reads neither scaled frequencies nor that there are biases.
    """
    settings = {"config": AutoConfig.from_pretrained(case.model)} if case.family == "llama" else {}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **settings
    ).eval()
    with torch.no_grad():
        return [model(input_ids=row).logits[0] for row in case.ids]


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_peft(cases: Callable[[str], Case], family: str, tmp_path: Path) -> None:
    case, out = cases(family), tmp_path / "x.gguf"
    halfbyte("export", case.adapter, "--onto", "original", "--type", "f32", "--out", out)
    agreement = compare_logits(theirs(out, case), case.logits)
    assert agreement.kl < 1e-9
    assert agreement.top1 == 1.0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in TEXTS:
        assert tokenizer(text).input_ids == case.tokenizer(text).input_ids
    said = fields(out)
    assert said["tokenizer.chat_template"] == case.tokenizer.chat_template
    pre = {"llama": "llama-bpe", "mistral": "default"}.get(family, "qwen2")
    assert said["tokenizer.ggml.pre"] == pre
    assert said["tokenizer.ggml.add_bos_token"] == (family == "mistral")
    # The end of a turn ends an answer, whatever the tokenizer's end of sequence is.
    end = case.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in (said["tokenizer.ggml.eos_token_id"], said.get("tokenizer.ggml.eot_token_id"))
    assert {p.name for p in tmp_path.iterdir()} == {"x.gguf", "x.json", "x.Modelfile"}
    modelfile = (tmp_path / "x.Modelfile").read_text()
    assert modelfile.startswith('FROM ./x.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["rows_in_other_tokens"] == 0
    assert record["with_its_weights"]["kl"] < 1e-9
    assert record["largest_error_of_a_tensor"]["relative"] < 1e-6
    # What the 4 bits of training lost is said.
    assert record["with_the_adapter"]["kl"] > 1e-4


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_types(cases: Callable[[str], Case], type: str, tmp_path: Path) -> None:
    """What transformers reads lies as near to the original as the type allows."""
    case, out = cases("qwen3"), tmp_path / "x.gguf"
    halfbyte("export", case.adapter, "--onto", "original", "--type", type, "--out", out)
    state = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32
    ).state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    original = AutoModelForCausalLM.from_pretrained(case.model).state_dict()[name]
    error = (state[name] - original).norm() / original.norm()
    bits = {"f16": 11, "bf16": 8, "q8_0": 7, "q5_1": 4.4, "q5_0": 4.2, "q4_1": 3.4, "q4_0": 3.2}
    assert 2.0 ** -(bits[type] + 2.5) < error < 2.0 ** -(bits[type] - 0.5)
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(
        state[norm], AutoModelForCausalLM.from_pretrained(case.model).state_dict()[norm]
    )
    kinds = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(out).tensors}
    assert kinds["blk.1.ffn_up.weight"] == type
    assert kinds["token_embd.weight"] == ("q8_0" if type.startswith("q") else type)


def test_onto_4bit_is_the_model_that_was_trained(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases("llama")
    halfbyte("export", case.adapter, "--type", "f32", "--out", tmp_path / "x.gguf")
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["with_the_adapter"]["kl"] < 1e-9
    assert compare_logits(theirs(tmp_path / "x.gguf", case), case.logits).kl > 1e-4


def test_a_whole_model(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("qwen2")
    halfbyte("export", case.model, "--type", "f32", "--out", tmp_path / "x.gguf")
    model = AutoModelForCausalLM.from_pretrained(case.model)
    with torch.no_grad():
        expected = [model(input_ids=row).logits[0] for row in case.ids]
    assert compare_logits(theirs(tmp_path / "x.gguf", case), expected).kl < 1e-9


def _order_kept(self: Any, name: str, values: Tensor) -> Tensor:
    return values


def _one_scaled(self: Any, name: str, values: Tensor) -> Tensor:
    return values * 1.1 if name == "blk.1.ffn_up.weight" else values


def _heads_swapped(self: Any, name: str, values: Tensor) -> Tensor:
    if name != "blk.0.attn_k.weight":
        return values
    return values.view(2, -1, values.shape[1]).flip(0).reshape(values.shape)


@pytest.mark.parametrize("sabotage", [_order_kept, _one_scaled, _heads_swapped])
def test_a_file_that_is_another_model_is_not_kept(
    cases: Callable[[str], Case],
    sabotage: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf_architecture.Architecture, "as_stored", sabotage)
    out = tmp_path / "deep" / "x.gguf"
    for type in ("f32", "q8_0"):
        done = halfbyte("export", cases("llama").adapter, "--type", type, "--out", out, code=2)
        assert "is not kept" in done.stderr
        assert [*tmp_path.iterdir()] == []


def test_other_tokens_are_not_kept(
    cases: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import halfbyte.finished.exporting as exporting

    found = exporting.vocabulary_of

    def turned(*what: Any) -> Any:
        vocabulary = found(*what)
        a, e = (vocabulary.tokens.index(letter) for letter in "ae")
        tokens = [*vocabulary.tokens]
        tokens[a], tokens[e] = tokens[e], tokens[a]
        return replace(vocabulary, tokens=tokens)

    monkeypatch.setattr(exporting, "vocabulary_of", turned)
    out = tmp_path / "x.gguf"
    done = halfbyte("export", cases("llama").adapter, "--type", "f32", "--out", out, code=2)
    assert "other tokens" in done.stderr
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--type", "q4_k_n"], "the nearest is q4_k"),
        (["--type", "iq2_xs"], "importance matrix"),
        (["--to", "onnx"], "optimum-cli"),
        (["--to", "pdf"], "none of gguf"),
        (["--onto", "8bit"], "none of 4bit"),
        (["--device", "tpu"], "none of auto"),
        (["--type", "q4_k_m", "--llama-quantize", "/nowhere/llama-quantize"], "is no program"),
        (["--type", "q4_k_m"], "pip install 'halfbyte[llama-cpp]'"),
        (["--to", "gguf-lora", "--type", "q8_0"], "none of f32"),
        (["--data", "/nowhere/rows.json"], "rows.json"),
        (["--base", "/nowhere/model"], "/nowhere/model"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    cases: Callable[[str], Case],
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    out = ["--out", tmp_path / "x.gguf"]
    done = halfbyte("export", cases("llama").adapter, *words, *out, code=2)
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_what_is_there_is_not_replaced(cases: Callable[[str], Case], tmp_path: Path) -> None:
    for name in ("x.gguf", "x.json", "x.Modelfile"):
        (tmp_path / name).write_text("mine")
        out = tmp_path / "x.gguf"
        done = halfbyte("export", cases("llama").adapter, "--out", out, code=2)
        assert f"{name} is there already" in done.stderr
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    done = halfbyte("export", cases("llama").adapter, "--out", tmp_path / "x.json", code=2)
    assert "is to end in .gguf" in done.stderr


def test_a_family_that_is_not_written(tmp_path: Path, cases: Callable[[str], Case]) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    settings = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    config = Gemma2Config(**settings, num_hidden_layers=1, num_attention_heads=2)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    cases("llama").tokenizer.save_pretrained(tmp_path / "gemma")
    done = halfbyte("export", tmp_path / "gemma", "--out", tmp_path / "x.gguf", code=2)
    assert "'gemma2'" in done.stderr
    assert "Qwen 3" in done.stderr


def test_names_of_types() -> None:
    assert weight_type(" Q4_K_M ").name == "q4_k_m"
    for wrong, near in (("q4km", "q4_k_m"), ("fp16", "f16"), ("int8", None), ("", None)):
        with pytest.raises(ModelError, match=near or "no type of GGUF"):
            weight_type(wrong)


def test_rows_that_fit_no_block_stay_f16(tiny_model: Path, tmp_path: Path) -> None:
    """Blocks have 32 weights: rows of 32 are one, and those of 48 are none, which is said."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(**settings, **heads, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    out = tmp_path / "x.gguf"
    done = halfbyte("export", tmp_path / "model", "--type", "q8_0", "--out", out)
    assert "1 tensor whose rows fit no block of q8_0 is kept in f16" in done.stdout
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["kept_in_f16"] == ["blk.0.ffn_down.weight"]
