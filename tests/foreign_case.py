"""Adapters as other programs leave them: made with PEFT, or their files written by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lora_case import quantized

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# What PEFT 0.4 wrote, and nothing else.
OLD_KEYS = (
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "revision",
    "target_modules",
    "task_type",
)


def base_of(folder: Path, more_rows: int = 0) -> Any:
    """The base model as bitsandbytes holds it, with ``more_rows`` of vocabulary."""
    base = quantized(folder)
    if more_rows:
        base.resize_token_embeddings(base.config.vocab_size + more_rows, mean_resizing=False)
    return base


@torch.no_grad()
def save_random(folder: Path, base: Path, more_rows: int = 0, **settings: Any) -> Path:
    """What PEFT saves of an adapter with these settings, of which nothing is zero."""
    import peft

    given = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ALL, **settings}
    model = peft.get_peft_model(base_of(base, more_rows), peft.LoraConfig(**given))
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=draw)
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.1 * drawn)
            else:
                parameter.mul_(1.0 + 0.1 * drawn)
    model.save_pretrained(folder)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def as_unsloth(adapter: Path, base: Path, folder: Path, template: str) -> Path:
    """What ``model.save_pretrained`` and ``tokenizer.save_pretrained`` leave after Unsloth.

    Its configuration names the quantized copy that was loaded, its targets are one expression where
    layers were chosen by kind, and the template stands in the tokenizer's configuration.
    """
    shutil.copytree(adapter, folder)
    config = config_of(folder)
    config |= {
        "base_model_name_or_path": "unsloth/tiny-llama-bnb-4bit",
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|"
        r"ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)",
        "unsloth_version": "2025.11.1",
    }
    write_config(folder, config)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    written |= {"chat_template": template, "padding_side": "right", "unsloth_version": "2025.11.1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    (folder / "README.md").write_text(
        "---\nbase_model: unsloth/tiny-llama-bnb-4bit\nlibrary_name: peft\n---\n# Model Card\n"
    )
    return folder


def as_axolotl(adapter: Path, base: Path, folder: Path) -> Path:
    """The last checkpoint of an Axolotl run: the trainer's state beside, the base by its path."""
    shutil.copytree(adapter, folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    config = config_of(folder)
    config |= {"base_model_name_or_path": "/workspace/models/base", "peft_version": "0.18.0"}
    write_config(folder, config | {"axolotl_config": "config.yml", "some_later_key": {"a": [1]}})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # never read
    (folder / "trainer_state.json").write_text('{"global_step": 20}')
    (folder / "README.md").write_text("---\nbase_model: /workspace/models/base\n---\n")
    return folder
