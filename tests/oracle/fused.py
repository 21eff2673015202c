"""halfbyte's fused path: the same model with its layers fused, on any device, eager or captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.data.batch import Bucket, TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.engine.capture import CapturedStep
from halfbyte.engine.scaler import LossScaler
from halfbyte.engine.step import TrainStep
from halfbyte.kernels import choice
from halfbyte.kernels.choice import Kernels
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.fused import FusedNetwork
from halfbyte.optim.choose import make_optimizer
from halfbyte.optim.flat import FlatParameters, flatten_parameters
from halfbyte.optim.schedule import schedule_table
from halfbyte.quant.joined import FlatAdapter
from halfbyte.recipe.schema import TrainingRecipe
from oracle.case import Case, Trace
from oracle.ours import load, tokenized


@dataclass(frozen=True)
class Way:
    """How a training is made that is to be the same one; ``keep`` and ``recompute`` as in fuse."""

    dtype: torch.dtype = torch.float32
    kernels: Kernels = choice.PLAIN
    keep: int | None = None
    recompute: int = 0
    captured: bool = False
    device: str = "cpu"


def fuse(
    model: QLoRAModel, kernels: Kernels, *, keep: int | None = None, recompute: int = 0
) -> FlatParameters:
    """Give ``model`` fused layers, and all its adapters one memory.

    Of the first ``keep`` layers (all by default) the weights are kept dequantized, the first
    ``recompute`` layers are made again in the backward pass.
    """
    flat = flatten_parameters(model.lora_parameters())
    network = FusedNetwork(model.network, model.head, model.compute_dtype, kernels)
    network.keep_copies(keep)
    network.use_scratch()
    network.recompute_layers(recompute)
    at = dict(zip(flat.names, flat.offsets, strict=True))
    offsets = {
        layer: (at[f"{name}.lora_A"], at[f"{name}.lora_B"]) for name, layer in model.lora.items()
    }
    # In fp32 too a copy, so that one that is not made again shows.
    shadow = flat.data.to(model.compute_dtype, copy=True)
    network.attach(FlatAdapter(flat.data, flat.grad, shadow, offsets))
    model.fused = network
    if model.position is not None:
        model.position.keys = torch.zeros(
            len(model.lora), 2, dtype=torch.int32, device=model.device
        )
    return flat


def bucket_of(rows: Sequence[TokenizedRow], size: int) -> Bucket:
    """One that holds any ``size`` of ``rows``, and is filled by none."""
    longest = max(map(len, rows))
    tokens = -(-size * longest // 64) * 64 + 32
    labels = min(tokens, size * max(row.num_labels for row in rows) + 5)
    return Bucket(tokens, labels, longest + 3)


def train_fused(folder: Path, case: Case, adapter: dict[str, Tensor], way: Way) -> Trace:
    """Train ``case`` from the model in ``folder`` and ``adapter``, every batch padded."""
    model = load(folder, case, device=way.device, dtype=way.dtype)
    with torch.no_grad():
        for name, parameter in model.lora_parameters().items():
            parameter.copy_(adapter[name])
    rows = tokenized(folder, case.loss_on)
    parameters = fuse(model, way.kernels, keep=way.keep, recompute=way.recompute)
    kernels = way.kernels is not choice.PLAIN
    step = TrainStep(
        model,
        parameters,
        make_optimizer(case.optimizer, parameters, TrainingRecipe(), use_kernels=kernels),
        schedule_table(case.steps, 0, case.learning_rate, "cosine"),
        max_grad_norm=case.max_grad_norm,
        scaler=LossScaler(way.dtype == torch.float16, model.device),
        dropout_keys=way.kernels.dropout_keys,
    )
    bucket = bucket_of(rows, case.batch_size)
    take_step = step
    if way.captured:
        captured = CapturedStep(step, [bucket], case.batch_size, case.gradient_accumulation)
        take_step = captured  # type: ignore[assignment]
    scale = step.scaler.scale.item()
    first: dict[str, Tensor] = {}
    losses = []
    for number in range(1, case.steps + 1):
        at = (number - 1) * case.rows_per_step
        chosen = [rows[i % len(rows)] for i in range(at, at + case.rows_per_step)]
        result = take_step(
            number,
            [
                make_batch(
                    chosen[i : i + case.batch_size],
                    case.batch_size,
                    bucket.tokens,
                    bucket.labels,
                    bucket.max_seqlen,
                )
                for i in range(0, len(chosen), case.batch_size)
            ],
        )
        loss, _, updated = result.read()
        assert updated, f"step {number} made no update"
        losses.append(loss)
        if number == 1:
            views = parameters.views(parameters.grad)
            first = {n: (g / scale).cpu() for n, g in views.items()}
    labels = [
        [int(t) if learn else -100 for t, learn in zip(row.input_ids, row.loss_mask, strict=True)]
        for row in rows
    ]
    return Trace(first, losses, [row.input_ids.tolist() for row in rows], labels)
