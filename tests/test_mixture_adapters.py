"""Adapters beside a mixture's experts, and what PEFT makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from family_case import save_family
from halfbyte import Recipe, train
from halfbyte.events import read_events
from halfbyte.events.types import Warned
from halfbyte.finished import open_adapter
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.experts import DOWN, UP, NF4Experts
from lora_case import logits_of, make_rows, our_logits, peft_saved

MLP = ["gate_proj", "up_proj", "down_proj"]
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
MAKE: dict[str, Callable[[], Any]] = {
    "qwen 3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, head_dim=16, num_experts=4, mlp_only_layers=[0])
    ),
    "deepseek 3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SHAPE,
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
        )
    ),
    "qwen 2": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SHAPE, num_experts=4, shared_expert_intermediate_size=64)
    ),
}


def dequantized(qlora: QLoRAModel, folder: Path) -> Any:
    """transformers' model of ``folder`` with the weights that ``qlora`` computes with."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in qlora.linears.items():
        weight = layer.base.dequantize(torch.float32)
        base.get_submodule(name).weight = torch.nn.Parameter(weight)
    for name, module in qlora.network.named_modules():
        if isinstance(module, NF4Experts):
            for leaf in (UP, DOWN):
                matrices = [one.dequantize(torch.float32) for one in module.matrices[leaf]]
                getattr(base.get_submodule(name), leaf).data.copy_(torch.stack(matrices))
    return base


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("excluded", [[], MLP], ids=["all-linear", "no MLP"])
@pytest.mark.parametrize("name", MAKE)
def test_what_peft_would_leave_out_is_told(
    name: str, excluded: list[str], tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    folder = save_family(MAKE[name], tiny_model, tmp_path / "model")
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(folder)},
            "data": {"path": str(tiny_rows), "held_out": 0, "max_length": 200},
            "precision": "fp32",
            "device": "cpu",
            "lora": {"r": 4, "exclude_modules": excluded},
            "training": {"max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0},
            "evaluation": {"prompts": 0, "base_loss": False},
        }
    )
    run = train(recipe, out=tmp_path / "run", runs=tmp_path)
    warned = [r.event.text for r in read_events(run.folder) if isinstance(r.event, Warned)]
    told = any("PEFT takes these names for the experts'" in text for text in warned)
    assert ("takes for the experts' own" in (run.adapter / "README.md").read_text()) == told
    qlora = open_adapter(run.folder, device="cpu").qlora
    rows = make_rows(300)
    theirs = logits_of(peft_saved(run.adapter, dequantized(qlora, folder)), rows)
    apart = (our_logits(qlora, rows) - theirs).abs().max() / theirs.abs().max()
    assert told == (not excluded)
    if excluded or name == "qwen 2":
        assert apart < 1e-4
    else:
        assert apart > 1e-3, "PEFT loads it: nothing need be said any more"
