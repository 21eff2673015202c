"""Clipping by the global norm (Pascanu et al., 2013, arXiv 1211.5063, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_
_PART = 1024


def global_norm(grad: Tensor) -> Tensor:
    """Euclidean norm of all gradients together: ``grad`` fp32 [n] → fp32 scalar on its device.

    It is infinite or NaN where a gradient is.
    """
    # A sum of five million squares loses four digits in fp32, one of sums of 1,024 loses none.
    whole = grad.numel() // _PART * _PART
    parts = torch.linalg.vector_norm(grad[:whole].view(-1, _PART), dim=1)
    return torch.linalg.vector_norm(torch.cat([parts, grad[whole:]]))


def clip_scale(norm: Tensor, max_grad_norm: float) -> Tensor:
    """The factor min(1, max_grad_norm / (norm + 1e-6)) that brings the norm to the limit, fp32.

    A limit of 0 clips nothing.
    """
    if max_grad_norm == 0.0:
        return torch.ones_like(norm)
    return (max_grad_norm / (norm + EPSILON)).clamp(max=1.0)
