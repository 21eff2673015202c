"""halfbyte's own path, from the model's folder to the last step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from halfbyte.data import batching
from halfbyte.data.batch import Segment, TokenizedRow
from halfbyte.data.tokenize import tokenize_rows
from halfbyte.engine.scaler import LossScaler
from halfbyte.engine.step import TrainStep
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.load import load_base
from halfbyte.model.lora import attach_lora
from halfbyte.model.source import open_model
from halfbyte.optim.choose import make_optimizer
from halfbyte.optim.flat import flatten_parameters
from halfbyte.optim.schedule import schedule_table
from halfbyte.recipe.schema import ModelRecipe, QuantizationRecipe, TrainingRecipe
from oracle.case import Case, Trace, make_rows


def load(
    folder: Path,
    case: Case,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    targets: str | list[str] = "all-linear",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> QLoRAModel:
    """The quantized model with a fresh adapter, by default on every linear layer and in fp32.

    In another ``dtype`` the products alone are.
    """
    source = open_model(ModelRecipe(name=str(folder)))
    loaded = load_base(
        source,
        quantization=QuantizationRecipe(double_quant=case.double_quant),
        device=device,
        compute_dtype=dtype,
        rest_dtype=torch.float32,
    )
    lora = attach_lora(
        loaded.model,
        r=case.r,
        lora_alpha=case.lora_alpha,
        lora_dropout=dropout,
        target_modules=targets,
        seed=seed,
    )
    return QLoRAModel(loaded.model, lora, dtype)


def tokenized(folder: Path, loss_on: str) -> list[TokenizedRow]:
    """The rows of :func:`make_rows` through halfbyte's own tokenizing."""
    tokenizer = open_model(ModelRecipe(name=str(folder))).tokenizer
    segments = [
        [Segment(prompt, loss_on == "all"), Segment(answer + tokenizer.eos_token, True)]
        for prompt, answer in make_rows()
    ]
    return tokenize_rows(tokenizer, segments, range(len(segments)))


def train_ours(folder: Path, case: Case, adapter: dict[str, Tensor]) -> Trace:
    """Train ``case`` from the model in ``folder`` and ``adapter``."""
    model = load(folder, case)
    with torch.no_grad():
        for name, parameter in model.lora_parameters().items():
            parameter.copy_(adapter[name])
    rows = tokenized(folder, case.loss_on)
    parameters = flatten_parameters(model.lora_parameters())
    step = TrainStep(
        model,
        parameters,
        make_optimizer(case.optimizer, parameters, TrainingRecipe()),
        schedule_table(case.steps, 0, case.learning_rate, "cosine"),
        max_grad_norm=case.max_grad_norm,
        scaler=LossScaler(False, model.device),
    )
    first: dict[str, Tensor] = {}
    losses = []
    for number in range(1, case.steps + 1):
        at = (number - 1) * case.rows_per_step
        chosen = [rows[i % len(rows)] for i in range(at, at + case.rows_per_step)]
        micro_batches = [
            batching.make_batch(chosen[i : i + case.batch_size])
            for i in range(0, len(chosen), case.batch_size)
        ]
        losses.append(step(number, micro_batches).loss.item())
        if number == 1:
            first = {n: g.clone() for n, g in parameters.views(parameters.grad).items()}
    labels = [
        [int(t) if learn else -100 for t, learn in zip(row.input_ids, row.loss_mask, strict=True)]
        for row in rows
    ]
    return Trace(first, losses, [row.input_ids.tolist() for row in rows], labels)
