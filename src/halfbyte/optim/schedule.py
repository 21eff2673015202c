"""The learning rate of every step, computed before the first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbyte.recipe.schema import Scheduler


def schedule_table(
    steps: int, warmup_steps: int, learning_rate: float, scheduler: Scheduler
) -> Tensor:
    """The rates of steps 1 … ``steps``, fp32 [steps].

    The rate rises linearly from 0 over ``warmup_steps``, then stays (``constant``) or falls to 0
    as a straight line (``linear``) or half a cosine (Loshchilov and Hutter, 2016, arXiv
    1608.03983, eq. 5, without restarts). These are the rates of transformers'
    ``get_*_schedule_with_warmup``: with a warm-up the first step's is 0, and the end would be
    reached one step after the last.
    """
    factors = [_factor(done, steps, warmup_steps, scheduler) for done in range(steps)]
    return torch.tensor([learning_rate * factor for factor in factors], dtype=torch.float32)


def _factor(done: int, steps: int, warmup_steps: int, scheduler: Scheduler) -> float:
    """Share of the peak rate after ``done`` steps."""
    if done < warmup_steps:
        return done / warmup_steps
    if scheduler == "constant":
        return 1.0
    progress = (done - warmup_steps) / max(1, steps - warmup_steps)
    if scheduler == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
