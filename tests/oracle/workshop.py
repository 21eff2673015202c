"""What the tests of the training step start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from halfbyte.data.batch import Batch, TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.engine.scaler import LossScaler
from halfbyte.engine.step import TrainStep
from halfbyte.model.causal import QLoRAModel
from halfbyte.optim.choose import make_optimizer
from halfbyte.optim.flat import flatten_parameters
from halfbyte.recipe.schema import TrainingRecipe
from oracle.case import Case, random_adapter
from oracle.ours import load


def model_of(
    folder: Path, case: Case, *, dropout: float = 0.0, seed: int = 0, device: str = "cpu"
) -> QLoRAModel:
    """The model in ``folder`` with a random adapter, neither matrix zero."""
    model = load(folder, case, dropout=dropout, seed=seed, device=device)
    parameters = model.lora_parameters()
    values = random_adapter({name: p.shape for name, p in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    return model


def step_of(
    model: QLoRAModel,
    optimizer: str = "adamw_8bit",
    *,
    rate: float = 1e-3,
    fp16: bool = False,
    steps: int = 10,
) -> TrainStep:
    """A training step at a constant rate; with ``fp16`` the loss is scaled."""
    parameters = flatten_parameters(model.lora_parameters())
    return TrainStep(
        model,
        parameters,
        make_optimizer(optimizer, parameters, TrainingRecipe()),
        torch.full((steps,), rate),
        max_grad_norm=1.0,
        scaler=LossScaler(fp16, model.device),
    )


def micro_batches(rows: Sequence[TokenizedRow], size: int) -> list[Batch]:
    """``rows`` in batches of ``size``."""
    return [make_batch(rows[i : i + size]) for i in range(0, len(rows), size)]
