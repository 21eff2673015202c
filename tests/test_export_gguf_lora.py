"""``halfbyte export --to gguf-lora``, beside what PEFT adds to each weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from command_line import halfbyte
from gguf_case import make_case

NAMES = {
    "attn_q": ("self_attn.q_proj", 4),
    "attn_k": ("self_attn.k_proj", 2),
    "attn_output": ("self_attn.o_proj", 0),
    "ffn_down": ("mlp.down_proj", 0),
}


def interleaved(delta: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: llama.cpp has row i of a head's first half before row i of its second."""
    out = np.empty_like(delta)
    size = len(delta) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = delta[head * size + i]
            out[head * size + 2 * i + 1] = delta[head * size + size // 2 + i]
    return out


@pytest.mark.parametrize("type", ["f32", "bf16"])
@pytest.mark.parametrize("rslora", [False, True])
def test_each_product_is_pefts(tmp_path: Path, rslora: bool, type: str) -> None:
    """With ranks and alphas that differ from layer to layer."""
    case = make_case(tmp_path, "llama", use_rslora=rslora)
    out = tmp_path / "out" / "x.gguf"
    options = ["--to", "gguf-lora", "--type", type, "--out", out]
    done = halfbyte("export", case.adapter, *options)
    assert "alpha" in done.stdout
    reader = gguf.GGUFReader(out)
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.type"] == "adapter"
    assert said["adapter.type"] == "lora"
    assert said["general.architecture"] == "llama"
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(case.model), case.adapter)
    assert len(tensors) == 2 * 2 * len(NAMES)
    for layer in range(2):
        for theirs, (ours, heads) in NAMES.items():
            module = peft.base_model.model.model.layers[layer].get_submodule(ours)
            expected = module.get_delta_weight("default").numpy()
            if heads:
                expected = interleaved(expected, heads)
            a, b = (tensors[f"blk.{layer}.{theirs}.weight.lora_{which}"] for which in "ab")
            # As llama.cpp scales it.
            found = said["adapter.lora.alpha"] / len(a) * (b @ a)
            most = 1e-6 if type == "f32" else 1e-2
            assert np.abs(found - expected).max() < most * np.abs(expected).max()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "has DoRA, for which"),
        ({"modules_to_save": ["lm_head"]}, "has trained embeddings, for which"),
    ],
)
def test_what_has_no_place_is_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    case = make_case(tmp_path, "qwen3", **settings)
    out = tmp_path / "x.gguf"
    done = halfbyte("export", case.adapter, "--to", "gguf-lora", "--out", out, code=2)
    assert says in done.stderr
    assert "--to gguf" in done.stderr
    assert not out.exists()
    done = halfbyte("export", case.model, "--to", "gguf-lora", "--out", out, code=2)
    assert "is a whole model" in done.stderr
    # Merged, they are there.
    halfbyte("export", case.adapter, "--onto", "original", "--type", "f32", "--out", out)
    network = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        apart = [
            (network(input_ids=row).logits[0] - logits).abs().max()
            for row, logits in zip(case.ids, case.logits, strict=True)
        ]
    assert max(apart) < 1e-3
