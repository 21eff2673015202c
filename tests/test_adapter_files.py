"""Adapters on disk are PEFT's: PEFT loads ours, we load PEFT's, and the logits are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.errors import ModelError
from halfbyte.model.adapter_files import read_adapter, save_adapter
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.load import load_base
from halfbyte.model.lora import attach_lora
from halfbyte.model.source import open_model
from halfbyte.recipe.schema import ModelRecipe, QuantizationRecipe

peft = pytest.importorskip("peft")

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, sliding_window=8, query_pre_attn_scalar=16)
    ),
}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=["all", "two"])
@pytest.mark.parametrize("family", MODELS)
def test_peft_loads_it_and_gives_the_same_logits(
    family: str, targets: str | list[str], tiny_model: Path, tmp_path: Path
) -> None:
    torch.manual_seed(11)
    folder = tmp_path / "base"
    MODELS[family]().save_pretrained(folder)
    for path in tiny_model.glob("token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    loaded = load_base(
        open_model(ModelRecipe(name=str(folder))),
        quantization=QuantizationRecipe(),
        device="cpu",
        compute_dtype=torch.float32,
        rest_dtype=torch.float32,
    )
    lora = attach_lora(
        loaded.model, r=4, lora_alpha=6.0, lora_dropout=0.1, target_modules=targets, seed=1
    )
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, layer in lora.items():
        assert layer.lora_A is not None
        assert layer.lora_B is not None
        layer.lora_B.data.normal_(std=0.2)
        layers[name] = (layer.lora_A.detach(), layer.lora_B.detach())
    saved = tmp_path / "adapter"
    save_adapter(
        saved,
        layers,
        base_name=str(folder),
        r=4,
        lora_alpha=6.0,
        lora_dropout=0.1,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in layers}),
    )
    assert sorted(p.name for p in saved.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    model = QLoRAModel(loaded.model, lora, torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    for name, linear in model.linears.items():
        weight = linear.base.dequantize(torch.float32)
        reference.get_submodule(name).weight = torch.nn.Parameter(weight)
    ids = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    batch = make_batch([TokenizedRow(ids[0].numpy(), np.zeros(24, dtype=bool), 0)])
    model.network.eval()
    with torch.no_grad():
        without = reference.eval()(input_ids=ids).logits[0]
        adapted = peft.PeftModel.from_pretrained(reference, saved).eval()
        expected = adapted(input_ids=ids).logits[0]
        got = model.logits(batch)
    assert (expected - without).abs().max() > 0.05 * expected.abs().max()
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()

    again = read_adapter(saved)
    assert again.layers.keys() == layers.keys()
    for name, pair in layers.items():
        assert all(torch.equal(x, y) for x, y in zip(again.layers[name], pair, strict=True))

    # And the way back: what PEFT writes is read here.
    adapted.save_pretrained(tmp_path / "theirs")
    theirs = read_adapter(tmp_path / "theirs")
    assert theirs.layers.keys() == layers.keys()
    ours = again.config
    known = {k: v for k, v in theirs.config.items() if k in ours and k != "target_modules"}
    assert known == {k: ours[k] for k in known}
    assert set(theirs.config["target_modules"]) == set(ours["target_modules"])


def small(folder: Path) -> Path:
    pair = (torch.ones(2, 3), torch.ones(4, 2))
    save_adapter(
        folder,
        {"model.layers.0.q_proj": pair},
        base_name="base",
        r=2,
        lora_alpha=4,
        lora_dropout=0.0,
        target_modules=["q_proj"],
    )
    return folder


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves the adapter that was there, whole."""
    import safetensors.torch

    folder = small(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        small(tmp_path)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def make_pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def make_odd(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"lm_head.weight": torch.ones(2)}, folder / "adapter_model.safetensors")


def lose_b(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "adapter_model.safetensors")
    save_file(
        {k: t for k, t in state.items() if "lora_A" in k}, folder / "adapter_model.safetensors"
    )


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "missing"),
        (lambda f: (f / "adapter_config.json").write_text("["), "JSON"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "missing"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 64), "damaged"),
        (make_pickled, "pickled"),
        (make_odd, "no LoRA adapter has"),
        (lose_b, "do not fit"),
        (lambda f: change_config(f, peft_type="IA3"), "LoRA"),
        (lambda f: change_config(f, bias="all"), "bias"),
    ],
)
def test_trouble_is_one_sentence(spoil: Any, says: str, tmp_path: Path) -> None:
    spoil(small(tmp_path))
    with pytest.raises(ModelError, match=says) as error:
        read_adapter(tmp_path)
    assert "\n" not in str(error.value)
