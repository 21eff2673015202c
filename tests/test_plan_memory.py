"""Estimated bytes against bytes that are counted on a tiny model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.engine.saved import saved_bytes
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.lora import attach_lora
from halfbyte.model.skeleton import quantized_linears
from halfbyte.optim.choose import make_optimizer
from halfbyte.optim.flat import flatten_parameters
from halfbyte.plan.device import Device
from halfbyte.plan.memory import Setup, kept_bytes, nf4_bytes, optimizer_bytes, weight_bytes
from halfbyte.plan.parameters import model_shape
from halfbyte.plan.speed import device_speed, step_seconds
from halfbyte.quant.linear import QLoRALinear
from halfbyte.quant.nf4 import quantize_nf4
from halfbyte.recipe.schema import TrainingRecipe

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**SIZES, sliding_window=64)),
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WITHIN = 1.25  # an estimate may be this many times too large or too small


def setup(precision: str, upcast: bool, targets: str | tuple[str, ...]) -> Setup:
    return Setup(precision, upcast, 64, True, 8, targets, "adamw_8bit")


def quantized(family: str, made: Setup) -> QLoRAModel:
    model_class, config = FAMILIES[family]
    torch.manual_seed(0)
    compute = TYPES[made.precision]
    network = model_class(config).to(torch.float32 if made.upcast_rest else compute)
    for name, linear in quantized_linears(network).items():
        weight = quantize_nf4(linear.weight.detach(), block_size=64, double_quant=True)
        layer = QLoRALinear.from_weight(
            weight, None, linear.in_features, linear.out_features, compute
        )
        network.set_submodule(name, layer)
    targets = made.target_modules
    lora = attach_lora(
        network,
        r=made.r,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        seed=1,
    )
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for layer in lora.values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    return QLoRAModel(network, lora, compute)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "made",
    [
        setup("fp32", True, "all-linear"),
        setup("bf16", True, ("q_proj", "v_proj")),
        setup("bf16", False, "all-linear"),
    ],
    ids=["fp32", "bf16 on two layers", "bf16 throughout"],
)
def test_activations_are_estimated_within_a_quarter(family: str, made: Setup) -> None:
    model, shape = quantized(family, made), model_shape(FAMILIES[family][1])
    rows = [TokenizedRow(np.arange(n) % 500, np.ones(n, bool), n) for n in (40, 90, 70)]
    batch = make_batch(rows)
    counted = {}
    for checkpointing in (False, True):
        model.use_gradient_checkpointing(checkpointing)
        counted[checkpointing] = saved_bytes(model, batch)
        estimate = kept_bytes(shape, made, tokens=batch.num_tokens, checkpointing=checkpointing)
        assert 1 / WITHIN < estimate / counted[checkpointing] < WITHIN
    assert counted[True] < counted[False] / 5  # or the two cases would not tell apart


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [64, 256])
def test_weights_in_nf4_are_counted_exactly(double_quant: bool, block_size: int) -> None:
    for size in ((352, 128), (7, 33), (1, 1), (300, 257)):
        weight = quantize_nf4(torch.randn(size), block_size=block_size, double_quant=double_quant)
        n = size[0] * size[1]
        assert nf4_bytes(n, block_size, double_quant) == weight.nbytes


def test_weights_and_optimizer_of_a_model_are_counted_exactly() -> None:
    made = setup("bf16", True, ("q_proj", "down_proj"))
    model, shape = quantized("qwen3", made), model_shape(FAMILIES["qwen3"][1])
    nf4 = sum(layer.base.nbytes for layer in model.linears.values())
    trained = {id(p) for p in model.lora_parameters().values()}
    rest = sum(p.nbytes for p in model.network.parameters() if id(p) not in trained)
    assert weight_bytes(shape, made) == nf4 + rest

    parameters = flatten_parameters(model.lora_parameters())
    for name in ("adamw", "adamw_8bit"):
        optimizer = make_optimizer(name, parameters, TrainingRecipe())
        state = sum(t.nbytes for n, t in optimizer.state_tensors().items() if t.numel() > 1)
        counted = optimizer_bytes(
            shape, Setup("bf16", True, 64, True, 8, made.target_modules, name)
        )
        assert counted == pytest.approx(state, rel=0.02)


def test_counts_are_those_of_the_model_itself() -> None:
    for model_class, config in FAMILIES.values():
        model = model_class(config)
        shape = model_shape(config)
        assert shape.frozen == model.num_parameters()
        assert shape.head == model.get_output_embeddings().weight.numel()
        assert len(shape.linears) == 4 * 7


def test_time_follows_the_work() -> None:
    shape = model_shape(FAMILIES["llama"][1])
    made = setup("fp32", True, "all-linear")
    cpu = device_speed(Device("cpu", "c", 1, 1, None, False, 2), "fp32")

    def seconds(**changed: Any) -> float:
        usual = {"tokens": 2048, "row_tokens": 512, "passes": 1}
        return step_seconds(shape, made, cpu, **{**usual, "recomputed": 0, "copied": 4, **changed})

    assert seconds(passes=4) == pytest.approx(4 * seconds())
    assert seconds(recomputed=4) > 1.3 * seconds()
    assert seconds(copied=0) > seconds()
    assert seconds(tokens=4096) > 1.8 * seconds()
    emulated = device_speed(Device("cpu", "c", 1, 1, None, False, 2), "bf16")
    assert emulated.flops < cpu.flops / 10
