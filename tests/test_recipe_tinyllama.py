"""The TinyLlama recipe is the known run, setting by setting, and has its counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from halfbyte.plan.device import Device
from halfbyte.plan.parameters import ModelShape, model_shape
from halfbyte.plan.resolve import Resolved, resolve
from halfbyte.recipe import Recipe
from halfbyte.recipe.settings import get, settings

PATH = Path(__file__).resolve().parent.parent / "recipes" / "tinyllama-chatdoctor.yaml"

# The configuration of TinyLlama/TinyLlama-1.1B-Chat-v1.0.
TINYLLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

STATED = {
    "model.name": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "data.path": "lavita/ChatDoctor-HealthCareMagic-100k",
    "data.split": "train",
    "data.instruction": "If you are a doctor, please answer the medical questions based on the "
    "patient's description.",
    "data.template": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### output:\n{output}",
    "data.loss_on": "all",
    "data.limit": 500,
    "data.held_out": 100,
    "data.held_out_from": "after",
    "data.max_length": 512,
    "seed": 42,
    "precision": "bf16",
    "quantization.type": "nf4",
    "quantization.block_size": 64,
    "quantization.double_quant": False,
    "quantization.upcast_rest": True,
    "lora.r": 16,
    "lora.lora_alpha": 32,
    "lora.lora_dropout": 0.05,
    "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "training.learning_rate": 2e-4,
    "training.lr_scheduler": "cosine",
    "training.warmup_steps": 0,
    "training.optimizer": "paged_adamw_8bit",
    "training.adam_beta1": 0.9,
    "training.adam_beta2": 0.999,
    "training.adam_epsilon": 1e-8,
    "training.weight_decay": 0.0,
    "training.max_grad_norm": 1.0,
    "training.batch_size": 4,
    "training.gradient_accumulation": 1,
    "training.epochs": 3,
    "training.max_steps": None,
    "training.gradient_checkpointing": True,
    "training.logging_steps": 10,
    "evaluation.keep": "last",
    "report.loss_at_steps": [10, 50, 100, 200, 300, 370],
}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.load(PATH)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return model_shape(LlamaConfig(**TINYLLAMA))


def on(recipe: Recipe, device: Device) -> Resolved:
    return resolve(
        recipe,
        device=device,
        model_config=LlamaConfig(**TINYLLAMA),
        rows=500,
        max_length=512,
        held_out=100,
    )


@pytest.mark.parametrize("key", STATED)
def test_it_states_the_known_run(recipe: Recipe, key: str) -> None:
    assert get(recipe, key) == STATED[key]


def test_its_counts(shape: ModelShape, recipe: Recipe) -> None:
    trainable = shape.trainable(recipe.lora.r, recipe.lora.target_modules)
    assert trainable == 4_505_600
    assert shape.frozen == 1_100_048_384
    assert shape.frozen + trainable == 1_104_553_984
    sizes = [
        rows * columns
        for pair in shape.adapter_shapes(16, recipe.lora.target_modules).values()
        for rows, columns in pair
    ]
    assert max(sizes) == 32_768
    assert len(sizes) == 22 * 4 * 2


T4 = Device("cuda", "Tesla T4", 15_600_000_000, 15_300_000_000, (7, 5), False, 2)
H100 = Device("cuda", "NVIDIA H100", 85_000_000_000, 84_000_000_000, (9, 0), True, 16)
AVX2 = Device("cpu", "some CPU", 24_000_000_000, 20_000_000_000, None, False, 2)


@pytest.mark.parametrize("device", [T4, H100, AVX2], ids=lambda device: device.name)
def test_it_is_the_same_run_on_every_device(recipe: Recipe, device: Device) -> None:
    resolved = on(recipe, device)
    assert (resolved.steps, resolved.steps_per_epoch) == (375, 125)
    changed = {k for k in settings() if get(recipe, k) != get(resolved.recipe, k)}
    # The optimizer's mathematics is the same: its state is small and stays on the device.
    assert changed == {
        "device",
        "evaluation.every_steps",
        "checkpoints.every_steps",
        "training.optimizer",
    }
    paged = [c for c in resolved.choices if c.key == "training.optimizer"]
    assert [(c.asked, c.value) for c in paged] == [("paged_adamw_8bit", "adamw_8bit")]
    if device.kind == "cuda":
        assert "32,768 elements" in paged[0].reason


def test_bf16_is_kept_where_it_is_emulated_and_warned_of(recipe: Recipe) -> None:
    for device, better in ((T4, "fp16"), (AVX2, "fp32")):
        resolved = on(recipe, device)
        assert resolved.recipe.precision == "bf16"
        (warning,) = resolved.warnings
        assert f"--set precision=auto, which is {better} here." in warning
        chosen = on(Recipe.load(PATH, ["precision=auto"]), device)
        assert chosen.recipe.precision == better
        assert chosen.warnings == []
    assert on(recipe, H100).warnings == []
