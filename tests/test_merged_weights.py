"""Merged weights against PEFT's merge, on the original weights and on bitsandbytes' NF4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

import peft
from bitsandbytes import functional

from adapter_case import logits_of as loaded_logits
from adapter_case import peft_adapter, peft_logits
from command_line import halfbyte
from family_case import FAMILIES, bitsandbytes_folder, save_family
from halfbyte.errors import HalfbyteError, ModelError
from halfbyte.export.merged_weights import BaseWeights, MergedWeights
from halfbyte.model.adapter_files import SavedAdapter, read_adapter
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.load import load_base
from halfbyte.model.lora import attach_lora
from halfbyte.model.safetensors_files import SafetensorsFiles
from halfbyte.model.saved_scale import saved_scales
from halfbyte.model.source import ModelSource, open_model
from halfbyte.recipe import Recipe
from halfbyte.recipe.schema import LoraRecipe, ModelRecipe, QuantizationRecipe
from halfbyte.run.adapter_start import low_rank_start
from lora_case import (
    logits_of,
    make_rows,
    our_logits,
    our_model,
    put,
    save,
    save_models,
    settings_of,
)

FOUR = ["q_proj", "v_proj", "gate_proj", "down_proj"]
NEW = ["<tool>", "</tool>"]
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"layers\\.0\\..*(q|v)_proj": 2, "down_proj": 8},
    "alpha_pattern": {"model.layers.1.mlp.gate_proj": 64.0, "v_proj": 1.0},
}
# Family, settings of the adapter, new tokens.
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "plain": ("llama", {}, []),
    "patterns, rsLoRA": ("llama", {**PATTERNS, "use_rslora": True}, []),
    "DoRA": ("qwen3", {"use_dora": True, **PATTERNS}, []),
    "new tokens": ("llama", {}, NEW),
    "new tokens, tied": ("qwen3", {}, NEW),
    "both whole": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, []),
    "whole, tied": ("qwen3", {"modules_to_save": ["embed_tokens"]}, []),
}
FP32 = torch.float32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory, "llama", "qwen3")


def lora_of(**changed: Any) -> LoraRecipe:
    return LoraRecipe(r=4, lora_alpha=8.0, target_modules=FOUR).model_copy(update=changed)


def trained(
    folder: Path, out: Path, lora: LoraRecipe, new: list[str]
) -> tuple[ModelSource, SavedAdapter]:
    model = our_model(folder, lora, new_tokens=new)
    put(model.lora_parameters())
    save(model, out, lora, folder)
    return open_model(ModelRecipe(name=str(folder), new_tokens=new)), read_adapter(out)


def through_bitsandbytes(weight: Tensor) -> Tensor:
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return functional.dequantize_4bit(codes, state)


def reference(source: ModelSource, folder: Path, onto: BaseWeights) -> Any:
    """transformers' model in fp32 with the weights that the adapter is merged onto."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32)
    if source.new_tokens is not None:
        model.resize_token_embeddings(source.new_tokens.rows, mean_resizing=False)
        model.get_input_embeddings().weight.data.copy_(source.read("model.embed_tokens.weight"))
        head = "lm_head.weight" if "lm_head.weight" in source.names() else None
        model.get_output_embeddings().weight.data.copy_(
            source.read(head or "model.embed_tokens.weight")
        )
    if onto == "4bit":
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.data = through_bitsandbytes(module.weight.data)
    return model


@pytest.mark.parametrize("onto", ["original", "4bit"])
@pytest.mark.parametrize("case", CASES)
def test_they_are_what_peft_merges(
    case: str, onto: BaseWeights, folders: dict[str, Path], tmp_path: Path
) -> None:
    family, changed, new = CASES[case]
    source, saved = trained(folders[family], tmp_path, lora_of(**changed), new)
    merged = MergedWeights(source, saved, onto=onto, quantization=QuantizationRecipe())
    base = reference(source, folders[family], onto)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload().state_dict()
    changed_names = set()
    for name in merged.names():
        ours = merged.read(name, FP32)
        bound = 3e-6 * float(theirs[name].abs().max())
        assert float((ours - theirs[name]).abs().max()) <= bound, name
        if not torch.equal(ours, before[name]):
            changed_names.add(name)
        bf16 = merged.read(name, torch.bfloat16)
        assert torch.equal(bf16, ours.bfloat16())
    assert {f"{name}.weight" for name in saved.layers} <= changed_names
    assert merged.tied == (family == "qwen3")


# Of adapters that PEFT makes: family, settings, whether embedding and head are one matrix after.
ENDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}, False),
    "head, once tied": ("qwen3", {"target_modules": ["q_proj", "lm_head"]}, False),
    "embedding whole, once tied": ("qwen3", {"modules_to_save": ["embed_tokens"]}, False),
    "still tied": (
        "qwen3",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "scattered rows, tied": ("qwen3", {"trainable_token_indices": [5, 9, 300]}, True),
    "scattered rows": ("llama", {"trainable_token_indices": [9, 5, 40]}, False),
}


@pytest.mark.parametrize("case", ENDS)
def test_embedding_and_head_as_peft_trains_them(
    case: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The merged folder as transformers loads it gives the logits of PEFT's adapter."""
    family, settings, tied = ENDS[case]
    base, adapter, out = folders[family], tmp_path / "adapter", tmp_path / "out"
    peft_adapter(base, adapter, **{"target_modules": ["q_proj"], **settings})
    words = ("--onto", "original", "--dtype", "fp32", "--device", "cpu")
    halfbyte("merge", adapter, "--out", out, *words)
    ids = torch.randint(3, 310, (40,), generator=torch.Generator().manual_seed(3))
    ids[::4] = 9
    expected = peft_logits(base, adapter, ids)
    off = (loaded_logits(out, ids) - expected).abs().max()
    assert float(off) < 1e-4 * float(expected.std())
    names = SafetensorsFiles.of_folder(out).names()
    assert ("lm_head.weight" in names) == (not tied)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == tied


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_start_from_the_weights(init: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """In 4 bits it is the model that was trained, which had other 4-bit weights with PiSSA."""
    lora = lora_of(init=init)
    folder = folders["llama"]
    recipe = Recipe.model_validate(
        {"model": {"name": str(folder)}, "data": {"path": "x.jsonl"}, "lora": lora.model_dump()}
    )
    source = open_model(recipe.model)
    start = low_rank_start(recipe, source)
    assert start is not None
    loaded = load_base(
        source,
        quantization=QuantizationRecipe(),
        device="cpu",
        compute_dtype=FP32,
        rest_dtype=FP32,
        hook=start,
    )
    layers = attach_lora(loaded.model, seed=3, start=start.pairs, **settings_of(lora))
    model = QLoRAModel(loaded.model, layers, FP32)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in model.lora_parameters().values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    save(model, tmp_path, lora, folder)
    saved, initial = read_adapter(tmp_path), model.initial()
    merged = MergedWeights(
        source, saved, onto="4bit", quantization=QuantizationRecipe(), start=initial
    )
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32)
    plain.load_state_dict({name: merged.read(name, FP32) for name in merged.names()})
    rows = make_rows()
    got, expected = logits_of(plain.eval(), rows), our_logits(model, rows)
    assert float((got - expected).abs().max()) < 2e-4 * float(expected.abs().max())
    onto = MergedWeights(source, saved, onto="original", quantization=QuantizationRecipe())
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload().state_dict()
    for name in onto.names():
        assert torch.allclose(onto.read(name, FP32), theirs[name], atol=3e-6, rtol=1e-5), name


def test_experts_go_through_nf4_each_by_itself(tiny_model: Path, tmp_path: Path) -> None:
    folder = save_family(FAMILIES["qwen 3 moe"].make, tiny_model, tmp_path / "base")
    source = open_model(ModelRecipe(name=str(folder)))
    merged = MergedWeights(source, None, onto="4bit", quantization=QuantizationRecipe())
    found = [name for name in merged.names() if merged.experts(name)]
    assert found
    for name in found:
        whole = merged.read(name, torch.bfloat16)
        for number in range(merged.experts(name)):
            expected = through_bitsandbytes(source.read(f"{name}[{number}]", FP32))
            assert torch.equal(whole[number], expected.bfloat16())
            assert torch.equal(merged.read(f"{name}[{number}]", FP32), expected)


def test_a_checkpoint_in_nf4_gives_what_it_holds(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = bitsandbytes_folder(folders["llama"], tmp_path / "nf4")
    source = open_model(ModelRecipe(name=str(folder)))
    how = QuantizationRecipe(block_size=128, double_quant=False)
    merged = MergedWeights(source, None, onto="4bit", quantization=how)
    stored = source.stored_nf4
    assert stored is not None
    for name in merged.names():
        assert torch.equal(merged.read(name, FP32), source.read(name, FP32)), name
    with pytest.raises(ModelError, match="in 4 bits only"):
        MergedWeights(source, None, onto="original", quantization=how)


def test_what_does_not_fit_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    source, saved = trained(folders["llama"], tmp_path, lora_of(), [])
    how: dict[str, Any] = {"onto": "original", "quantization": QuantizationRecipe()}
    name, (a, b) = next(iter(saved.layers.items()))
    for layers, says in (
        ({"model.layers.7.mlp.up_proj": (a, b)}, "layers.7.mlp.up_proj, which"),
        ({name: (a[:, :-1], b)}, "another base model"),
        ({name: (a[:-1], b[:, :-1])}, "rank 4 and its matrices have rank 3"),
    ):
        with pytest.raises(HalfbyteError, match=says):
            MergedWeights(source, SavedAdapter(layers, saved.config), **how)
    large = SavedAdapter({name: (a * 1e5, b * 1e5)}, saved.config)
    with pytest.raises(ModelError, match="--dtype bf16"):
        MergedWeights(source, large, **how).read(f"{name}.weight", torch.float16)


def test_scales_are_those_that_peft_computes(folders: dict[str, Path]) -> None:
    for changed in ({}, PATTERNS, {**PATTERNS, "use_rslora": True}):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=FOUR, **changed
        )
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folders["llama"]), config)
        found = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if hasattr(module, "lora_A") and name.endswith("_proj")
        }
        layers = {
            n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in found.items()
        }
        ours = saved_scales(SavedAdapter(layers, config.to_dict()))
        assert ours == {n: pytest.approx(m.scaling["default"]) for n, m in found.items()}
