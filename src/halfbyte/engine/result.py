"""What a step tells, read when it is wanted and not before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """Loss (mean over the step's labels), gradient norm before clipping, and whether an update
    was made (1 or 0): ``values`` fp32 [3] on the host, there when ``ended`` has passed."""

    values: Tensor
    ended: torch.cuda.Event | None = None
    began: torch.cuda.Event | None = None  # the end of the step before

    @classmethod
    def of(cls, values: Tensor, began: torch.cuda.Event | None) -> StepResult:
        """Copy ``values`` [3], which the next step will write over, without waiting for them."""
        if values.device.type == "cpu":
            return cls(values.clone())
        host = torch.empty(3, pin_memory=True)
        host.copy_(values, non_blocking=True)
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        return cls(host, ended, began)

    @property
    def loss(self) -> Tensor:
        return self._there()[0]

    @property
    def grad_norm(self) -> Tensor:
        return self._there()[1]

    @property
    def updated(self) -> Tensor:
        return self._there()[2] != 0

    def read(self) -> tuple[float, float, bool]:
        """Loss, gradient norm and whether an update was made; waits for the device."""
        loss, norm, updated = self._there().tolist()
        return loss, norm, bool(updated)

    def seconds(self) -> float | None:
        """Device seconds from the end of the step before to the end of this one.

        None where the host's clock measures it: on a CPU, and for the first step.
        """
        if self.ended is None or self.began is None:
            return None
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1e3

    def _there(self) -> Tensor:
        if self.ended is not None:
            self.ended.synchronize()
        return self.values
