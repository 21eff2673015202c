"""One optimizer step, the whole of it, in order.

This is the reference: whatever makes a step faster must give these numbers. Nothing in it waits
for the device or reads a value from it, so that :mod:`halfbyte.engine.capture` can record it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.data.batch import Batch
from halfbyte.engine.result import StepResult
from halfbyte.engine.scaler import LossScaler
from halfbyte.kernels.choice import Kernel
from halfbyte.model.causal import QLoRAModel
from halfbyte.optim.clip import clip_scale, global_norm
from halfbyte.optim.flat import FlatParameters


class Optimizer(Protocol):
    """An optimizer whose inputs stay on the device."""

    count: Tensor  # int64 scalar: updates made

    def step(self, lr: Tensor, clip_scale: Tensor, do_update: Tensor) -> None: ...


@dataclass(frozen=True)
class MicroBatch:
    """What a forward and backward pass reads, all of it on the model's device."""

    batch: Batch
    position: Tensor  # int64 [2]: number of the step and of the micro-batch, for the dropout masks
    num_labels: Tensor  # int64 scalar: labels of the whole step, all its micro-batches


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
        dropout_keys: Kernel | None = None,
    ) -> None:
        """``learning_rates`` fp32 [steps]: the rate of the first update, the second, …

        ``dropout_keys`` makes the keys of the dropout masks on the device, from the position there;
        without it the host makes them.
        """
        self.model = model
        self.parameters = parameters
        self.optimizer = optimizer
        self.learning_rates = learning_rates.to(model.device)
        self.max_grad_norm = max_grad_norm
        self.scaler = scaler
        self.dropout_keys = dropout_keys
        self.loss = torch.zeros((), device=model.device)
        self.values = torch.zeros(3, device=model.device)  # of the last step: see StepResult
        self._ended: torch.cuda.Event | None = None

    def __call__(self, number: int, micro_batches: Sequence[Batch]) -> StepResult:
        """Step ``number`` (from 1) on the rows of all ``micro_batches`` together."""
        model = self.model
        num_labels = sum(batch.num_labels for batch in micro_batches)
        model.begin_step(number)
        self.begin()
        for index, batch in enumerate(micro_batches):
            if model.position is not None:
                model.position.step, model.position.micro_batch = number, index
            self.accumulate(
                MicroBatch(
                    batch.to(model.device),
                    torch.tensor([number, index], device=model.device),
                    torch.tensor(num_labels, device=model.device),
                )
            )
        self.update()
        return self.result()

    def begin(self) -> None:
        """Nothing is accumulated."""
        self.parameters.grad.zero_()
        self.loss.zero_()

    def accumulate(self, micro: MicroBatch) -> None:
        """Add the gradients and the loss of one micro-batch."""
        model = self.model
        model.network.train()
        if self.dropout_keys is not None and model.position is not None:
            assert model.position.keys is not None
            self.dropout_keys(model.position.seed, micro.position, model.position.keys)
        # The mean is over the labels of the whole step, not over micro-batches or rows: rows of
        # unequal length weigh by their tokens, however they are spread over forward passes.
        loss = model.loss_and_gradients(micro.batch, self.scaler.scale / micro.num_labels)
        self.loss += loss / micro.num_labels

    @torch.no_grad()
    def update(self) -> None:
        """Make the update from what was accumulated, if it is finite."""
        # What was scaled is unscaled by the same factor that clips: one pass over the gradients.
        grad, scaler = self.parameters.grad, self.scaler
        norm = global_norm(grad) / scaler.scale
        finite = torch.isfinite(norm)
        factor = clip_scale(norm, self.max_grad_norm) / scaler.scale
        # A step without an update does not advance the schedule.
        at = self.optimizer.count.clamp(max=len(self.learning_rates) - 1)
        rate = self.learning_rates.index_select(0, at.view(1)).view(())
        self.optimizer.step(rate, factor, finite)
        scaler.update(finite)
        self.model.adapter_changed()
        self.values.copy_(torch.stack([self.loss, norm, finite.float()]))

    def result(self) -> StepResult:
        """The values of the step that was enqueued last, on their way to the host."""
        result = StepResult.of(self.values, self._ended)
        self._ended = result.ended
        return result
