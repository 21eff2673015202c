"""What the tests of training on a GPU start from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.data.batch import Batch, Bucket, TokenizedRow
from halfbyte.data.batching import Batches
from halfbyte.engine.capture import CapturedStep
from halfbyte.engine.result import StepResult
from halfbyte.engine.scaler import LossScaler
from halfbyte.engine.step import TrainStep
from halfbyte.kernels.choice import ALL, Kernels
from halfbyte.optim.choose import make_optimizer
from halfbyte.recipe.schema import TrainingRecipe
from oracle.case import Case, random_adapter, save_model
from oracle.fused import fuse
from oracle.ours import load

VOCABULARY, LONGEST, ROWS_AT_ONCE = 2000, 180, 4
# The last one holds any four rows; the labels of a batch fill it or do not.
BUCKETS = [Bucket(256, 192, 192), Bucket(448, 320, 192), Bucket(768, 768, 192)]
TEMPLATE = "{instruction}\n{input}\n{output}"
CASE = Case(r=16, lora_alpha=32)


def save_small_llama(folder: Path) -> None:
    """TinyLlama's kind, smaller: 4 layers of 512 with 8 query and 2 key and value heads."""
    save_model(
        folder,
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.05,
    )


def made_up_rows(count: int, shortest: int = 20, longest: int = LONGEST) -> list[TokenizedRow]:
    random = np.random.default_rng(5)
    return [
        TokenizedRow(
            random.integers(3, VOCABULARY, n).astype(np.int32), random.random(n) < 0.7, number
        )
        for number, n in enumerate(random.integers(shortest, longest + 1, count))
    ]


def made_up_batches(accumulation: int) -> Batches:
    """Of 66 rows, so that the last micro-batch of an epoch is a small one."""
    return Batches(made_up_rows(66), ROWS_AT_ONCE, accumulation, 7, BUCKETS)


def bucket_of(batch: Batch) -> Bucket:
    return Bucket(len(batch.input_ids), len(batch.label_ids), batch.max_seqlen)


def make_step(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    dropout: float = 0.05,
    keep: int | None = None,
    recompute: int = 0,
    kernels: Kernels = ALL,
) -> TrainStep:
    """A step of fused layers with a random adapter, neither matrix zero, and 8-bit AdamW."""
    model = load(folder, CASE, dropout=dropout, seed=3, device="cuda", dtype=dtype)
    values = random_adapter({n: p.shape for n, p in model.lora_parameters().items()})
    with torch.no_grad():
        for name, parameter in model.lora_parameters().items():
            parameter.copy_(values[name])
    parameters = fuse(model, kernels, keep=keep, recompute=recompute)
    return TrainStep(
        model,
        parameters,
        make_optimizer("adamw_8bit", parameters, TrainingRecipe(), use_kernels=kernels.adamw),
        torch.linspace(1e-3, 1e-4, 100),
        max_grad_norm=1.0,
        scaler=LossScaler(dtype == torch.float16, model.device),
        dropout_keys=kernels.dropout_keys,
    )


def capture(step: TrainStep, accumulation: int = 1) -> CapturedStep:
    return CapturedStep(step, BUCKETS, ROWS_AT_ONCE, accumulation)


def state_of(step: TrainStep) -> dict[str, Tensor]:
    """A copy of every tensor that the next step depends on."""
    tensors = {
        "parameters": step.parameters.data,
        **step.optimizer.state_tensors(),  # type: ignore[attr-defined]
        **step.scaler.state_tensors(),
    }
    return {name: tensor.clone() for name, tensor in tensors.items()}


def put_back(step: TrainStep, state: dict[str, Tensor]) -> None:
    step.parameters.data.copy_(state["parameters"])
    step.optimizer.load_state_tensors(state)  # type: ignore[attr-defined]
    step.scaler.load_state_tensors(state)
    step.model.adapter_changed()


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def take(
    step: Callable[[int, Sequence[Batch]], StepResult],
    batches: Batches,
    numbers: range,
    between: Callable[[int], None] = lambda number: None,
) -> list[tuple[float, float, bool]]:
    """Loss, gradient norm and whether there was an update, of each step; read at the end."""
    results = []
    for number in numbers:
        results.append(step(number, batches.step(number)))
        between(number)
    return [result.read() for result in results]


def write_rows(path: Path, count: int = 120) -> None:
    """JSONL rows of 30 to 250 letters with a rule to learn."""
    random = np.random.default_rng(0)
    words = ["cough", "fever", "rest", "drink", "water", "see a doctor", "pain", "at night"]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            asked = " ".join(random.choice(words, random.integers(2, 14)))
            row = {"instruction": "Say it backwards.", "input": asked, "output": asked[::-1]}
            file.write(json.dumps(row) + "\n")


def recipe_of(model: Path, rows: Path, steps: int, **training: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(model)},
        "data": {"path": str(rows), "held_out": 8, "max_length": 200, "template": TEMPLATE},
        "lora": {"r": 8, "lora_dropout": 0.05},
        "training": {
            "batch_size": 4,
            "gradient_accumulation": 1,
            "epochs": 9,
            "max_steps": steps,
            **training,
        },
        "evaluation": {"every_steps": 15, "keep": "last", "prompts": 1, "max_new_tokens": 4},
        "precision": "bf16",
        "device": "cuda",
    }
