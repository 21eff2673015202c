"""Adapters that PEFT itself has made, and runs of a tiny model, to make something of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from command_line import halfbyte


def peft_adapter(base: Path, folder: Path, *, seed: int = 1, **settings: Any) -> Path:
    """An adapter of random A, B and magnitudes, none of which does nothing."""
    wanted = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    config = peft.LoraConfig(task_type="CAUSAL_LM", **wanted)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            drawn = torch.randn(parameter.shape, generator=draw)
            if "lora_A" in name:
                parameter.copy_(drawn * parameter.shape[1] ** -0.5)
            elif "lora_B" in name:
                parameter.copy_(drawn * 0.02)
            else:
                parameter.mul_(1.0 + 0.1 * drawn)
    model.save_pretrained(folder)
    return folder


def in_nf4(base: Path) -> Any:
    """transformers' model with its linear layers through bitsandbytes' NF4, the head excepted."""
    from bitsandbytes import functional

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            codes, state = functional.quantize_4bit(
                module.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True
            )
            module.weight.data = functional.dequantize_4bit(codes, state)
    return model


@torch.no_grad()
def peft_logits(base: Any, adapter: Path, ids: Tensor) -> Tensor:
    """Logits [T, vocabulary] of ``base`` (a folder or a model) with the adapter, in fp32."""
    if isinstance(base, Path):
        base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


@torch.no_grad()
def logits_of(folder: Path, ids: Tensor) -> Tensor:
    """What transformers loads of ``folder`` says, computed in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float().eval()
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in standard deviations of the logits."""
    return float((ours - theirs).abs().max() / theirs.std())


def train_run(folder: Path, model: Path, rows: Path, *settings: str) -> Path:
    """A run of a few steps with held-out rows, whose adapter does something."""
    usual = ["data.held_out=5", "training.epochs=1", "training.learning_rate=0.02"]
    usual += ["training.batch_size=4", "precision=fp32", "checkpoints.keep_last=1"]
    halfbyte(
        *("train", "--model", model, "--data", rows, "--out", folder),
        *(word for setting in [*usual, *settings] for word in ("--set", setting)),
    )
    return folder


def refusal(*words: object) -> str:
    """The one sentence with which the command ends."""
    done = halfbyte(*words, code=2)
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("halfbyte: ")
    assert said.endswith(".")
    assert "Traceback" not in done.output
    return said
