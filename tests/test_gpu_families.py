"""On a GPU: families without fused layers, their steps captured, eager, and row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from halfbyte.data.batch import Batch, Bucket, TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.engine.capture import CapturedStep
from halfbyte.engine.scaler import LossScaler
from halfbyte.engine.step import TrainStep
from halfbyte.kernels.choice import ALL, ELEMENTWISE, Kernels
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.lora import attach_lora
from halfbyte.optim.choose import make_optimizer
from halfbyte.optim.flat import flatten_parameters
from halfbyte.quant.linear import QLoRALinear
from halfbyte.quant.nf4 import quantize_nf4
from halfbyte.recipe.schema import TrainingRecipe
from halfbyte.run.determinism import deterministic

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 10
ROWS_IN_BATCH = 4
BUCKETS = [Bucket(256, 128, 96), Bucket(384, 320, 128)]
SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32))


def gemma3() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        **SHAPE, head_dim=16, sliding_window=16, layer_types=kinds, query_pre_attn_scalar=16
    )
    return Gemma3ForCausalLM(config)


def phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**SHAPE, sliding_window=40))


def granite() -> PreTrainedModel:
    return GraniteForCausalLM(
        GraniteConfig(
            **SHAPE,
            attention_multiplier=0.1,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            logits_scaling=4.0,
        )
    )


def batches() -> list[Batch]:
    """A batch for each step, in the first bucket and the second by turns."""
    generator = np.random.default_rng(3)
    found = []
    for step in range(STEPS):
        bucket = BUCKETS[step % 2]
        rows = []
        for number in range(3 + step % 2):
            length = int(generator.integers(20, bucket.max_seqlen - 30))
            ids = generator.integers(3, SHAPE["vocab_size"], length).astype(np.int32)
            mask = np.arange(length) >= length // 2
            rows.append(TokenizedRow(ids, mask, number))
        found.append(
            make_batch(rows, ROWS_IN_BATCH, bucket.tokens, bucket.labels, bucket.max_seqlen)
        )
    return found


def step_of(
    make: Callable[[], PreTrainedModel],
    dtype: torch.dtype,
    kernels: Kernels | None,
    recompute: bool,
) -> TrainStep:
    """A step of a random model with dropout and a random adapter, the same ones each time.

    Without ``kernels`` it attends row by row. Dropout and the optimizer are the same in all ways.
    """
    torch.manual_seed(5)
    network = make().eval().requires_grad_(False).to(DEVICE)
    head = network.get_output_embeddings()
    for name, linear in list(network.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not head:
            out, columns = linear.weight.shape
            nf4 = quantize_nf4(linear.weight, double_quant=True)
            layer = QLoRALinear.from_weight(nf4, None, columns, out, dtype)
            network.set_submodule(name, layer)
    lora = attach_lora(
        network, r=64, lora_alpha=64, lora_dropout=0.1, target_modules="all-linear", seed=1
    )
    for layer in lora.values():
        assert layer.lora_B is not None
        layer.lora_B.data.normal_(std=0.02)
    model = QLoRAModel(network, lora, dtype)
    if kernels is not None:
        model.use_kernels(kernels)
        assert model.host_reads() is None
    position = model.position
    assert position is not None
    position.keys = torch.zeros(len(lora), 2, dtype=torch.int32, device=DEVICE)
    position.apply = ALL.apply_dropout
    parameters = flatten_parameters(model.lora_parameters())
    model.use_gradient_checkpointing(recompute)
    scaler = LossScaler(dtype == torch.float16, model.device)
    if dtype == torch.float16:
        scaler.scale.fill_(1024.0)  # so that the first gradients are finite
    return TrainStep(
        model,
        parameters,
        make_optimizer("adamw_8bit", parameters, TrainingRecipe(), use_kernels=True),
        torch.full((STEPS,), 1e-3),
        max_grad_norm=1.0,
        scaler=scaler,
        dropout_keys=ALL.dropout_keys,
    )


@pytest.mark.parametrize(
    ("make", "kernels", "dtype", "recompute"),
    [
        (qwen3, ALL, torch.bfloat16, False),
        (qwen3, ALL, torch.float32, True),
        (gemma3, ALL, torch.bfloat16, True),
        (gemma3, ELEMENTWISE, torch.float16, False),
        (phi3, ALL, torch.bfloat16, False),
        (phi3, ELEMENTWISE, torch.float16, True),
        (granite, ALL, torch.bfloat16, False),
    ],
)
def test_captured_is_eager_and_near_row_by_row(
    make: Callable[[], PreTrainedModel], kernels: Kernels, dtype: torch.dtype, recompute: bool
) -> None:
    """Bit for bit the eager step; the row loop's losses and first gradients but for rounding."""
    given = batches()
    losses: dict[str, list[float]] = {}
    weights: dict[str, list[Tensor]] = {}
    first: dict[str, Tensor] = {}
    with deterministic(True), torch.cuda.stream(torch.cuda.Stream()):
        for way in ("captured", "eager", "rows"):
            step = step_of(make, dtype, None if way == "rows" else kernels, recompute)
            start = step.parameters.data.clone()
            take: Callable[..., Any] = step
            if way == "captured":
                take = CapturedStep(step, BUCKETS, ROWS_IN_BATCH, 1)
                assert torch.equal(step.parameters.data, start)
                assert step.optimizer.count == 0
            losses[way], weights[way] = [], []
            for number, batch in enumerate(given, 1):
                losses[way].append(take(number, [batch]).loss.item())
                weights[way].append(step.parameters.data.clone())
                if number == 1:
                    first[way] = (step.parameters.grad / step.scaler.scale).double()
    for number in range(STEPS):
        assert losses["captured"][number] == losses["eager"][number], number + 1
        assert torch.equal(weights["captured"][number], weights["eager"][number]), number + 1
    assert not torch.equal(weights["eager"][-1], weights["eager"][0])
    rounding = 2e-3 if dtype == torch.float32 else 2e-2
    assert losses["eager"] == pytest.approx(losses["rows"], rel=rounding)
    ours, theirs = first["eager"], first["rows"]
    assert (ours @ theirs) / (ours.norm() * theirs.norm()) >= 1 - rounding / 10
    assert (ours.norm() / theirs.norm()).item() == pytest.approx(1, abs=rounding)
