"""A small finished run to judge, and what PEFT makes of its adapter in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from command_line import halfbyte
from halfbyte.finished.opened import OpenedAdapter


def train_run(folder: Path, model: Path, rows: Path, **data: Any) -> Path:
    """A finished run in ``folder``/run, of 8 steps; 8 of the rows are held out."""
    recipe = {
        "model": {"name": str(model)},
        "data": {"path": str(rows), "template": "chat", "held_out": 8, **data},
        "lora": {"r": 8, "lora_alpha": 16},
        "training": {
            "max_steps": 8,
            "learning_rate": 0.02,
            "batch_size": 4,
            "gradient_accumulation": 1,
        },
        "precision": "fp32",
        "device": "cpu",
        "evaluation": {"prompts": 0, "base_loss": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    halfbyte("train", folder / "recipe.yaml", "--out", folder / "run")
    return folder / "run"


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Oracle:
    """transformers' model with the run's 4-bit weights and PEFT's adapter, in float64."""

    def __init__(self, opened: OpenedAdapter, model: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        for name, layer in opened.qlora.linears.items():
            weight = layer.base.dequantize(torch.float32).cpu()
            network.get_submodule(name).weight = torch.nn.Parameter(weight)
        peft = PeftModel.from_pretrained(network, opened.found.adapter)
        self.peft = peft.double().eval()

    @torch.no_grad()
    def log_probabilities(self, ids: list[int], *, adapter: bool) -> torch.Tensor:
        """ln p of every next token, float64 [tokens, vocabulary], of one row alone."""
        tokens = torch.tensor([ids])
        if adapter:
            logits = self.peft(input_ids=tokens, use_cache=False).logits[0]
        else:
            with self.peft.disable_adapter():
                logits = self.peft(input_ids=tokens, use_cache=False).logits[0]
        assert logits.dtype == torch.float64
        return logits.log_softmax(dim=-1)
