"""Loss scaling for fp16, on the device.

Gradients of fp16 products underflow below 6e-8, so the loss is multiplied before the backward
pass and the gradients divided after it (Micikevicius et al., 2017, arXiv 1710.03740, section
3.2). The factor halves when a gradient overflows and doubles after 2,000 good steps in a row, as
torch.amp.GradScaler does, but it is a tensor that the host never reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH_STEPS = 2000


class LossScaler:
    """``scale`` is an fp32 scalar: 1 and constant unless ``enabled``."""

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self.scale = torch.tensor(65536.0 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, finite: Tensor) -> None:
        """``finite`` bool scalar: whether the step's gradient norm was finite."""
        if not self.enabled:
            return
        good = torch.where(finite, self.good_steps + 1, torch.zeros_like(self.good_steps))
        grow = good >= GROWTH_STEPS
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale.mul_(factor).clamp_(min=1.0)
        self.good_steps.copy_(torch.where(grow, torch.zeros_like(good), good))

    def state_tensors(self) -> dict[str, Tensor]:
        return {"scaler.scale": self.scale, "scaler.good_steps": self.good_steps}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        self.scale.copy_(state["scaler.scale"])
        self.good_steps.copy_(state["scaler.good_steps"])
