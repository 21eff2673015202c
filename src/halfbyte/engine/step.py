"""One optimizer step, the whole of it, in order.

This is the reference: whatever makes a step faster must give these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.data.batch import Batch
from halfbyte.engine.scaler import LossScaler
from halfbyte.model.causal import QLoRAModel
from halfbyte.optim.clip import clip_scale, global_norm
from halfbyte.optim.flat import FlatParameters


class Optimizer(Protocol):
    """An optimizer whose inputs stay on the device."""

    def step(self, lr: Tensor, clip_scale: Tensor, do_update: Tensor) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device: read it when the value is wanted, not before."""

    loss: Tensor  # fp32 scalar, mean over the labelled tokens of the whole step
    grad_norm: Tensor  # fp32 scalar, before clipping
    updated: Tensor  # bool scalar, false where the gradient was not finite

    def read(self) -> tuple[float, float, bool]:
        """Loss, gradient norm and whether an update was made; waits for the device."""
        return self.loss.item(), self.grad_norm.item(), bool(self.updated.item())

    def seconds(self) -> float | None:
        """Device seconds of the step; None where the host's clock measures it."""
        return None


class TrainStep:
    """``step(number, micro_batches)`` makes one update of the adapter."""

    def __init__(
        self,
        model: QLoRAModel,
        parameters: FlatParameters,
        optimizer: Optimizer,
        learning_rates: Tensor,
        *,
        max_grad_norm: float,
        scaler: LossScaler,
    ) -> None:
        """``learning_rates`` fp32 [steps]: the rate of step 1, 2, …"""
        self.model = model
        self.parameters = parameters
        self.optimizer = optimizer
        self.learning_rates = learning_rates.to(model.device)
        self.max_grad_norm = max_grad_norm
        self.scaler = scaler

    def __call__(self, number: int, micro_batches: Sequence[Batch]) -> StepResult:
        """Step ``number`` (from 1) on the rows of all ``micro_batches`` together."""
        model, scaler = self.model, self.scaler
        model.network.train()
        self.parameters.grad.zero_()

        # The mean is over the labels of the whole step, not over micro-batches or rows: rows of
        # unequal length weigh by their tokens, however they are spread over forward passes.
        num_labels = sum(batch.num_labels for batch in micro_batches)
        loss = torch.zeros((), device=model.device)
        for index, batch in enumerate(micro_batches):
            if model.position is not None:
                model.position.step, model.position.micro_batch = number, index
            part = model.loss_sum(batch) / num_labels
            (part * scaler.scale).backward()
            loss += part.detach()

        # What was scaled is unscaled by the same factor that clips: one pass over the gradients.
        norm = global_norm(self.parameters.grad) / scaler.scale
        finite = torch.isfinite(norm)
        factor = clip_scale(norm, self.max_grad_norm) / scaler.scale
        self.optimizer.step(self.learning_rates[number - 1], factor, finite)
        scaler.update(finite)
        return StepResult(loss, norm, finite)
