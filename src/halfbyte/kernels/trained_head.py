"""Cross-entropy from hidden states where rows of the head are trained too.

    L = Σ_t ( logsumexp(z_t) - z_t[label_t] ),   z_t = cap(scale · h_t Wᵀ)

As :mod:`halfbyte.kernels.loss`, chunk by chunk, with dL/dW_i = Σ_t dL/dz_t[i] h_t of the trained
rows i beside dL/dh. The sums over chunks are in fp32. Nothing is read by the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.cross_entropy import IGNORED
from halfbyte.kernels.loss import CHUNK_BYTES


class _TrainedHeadLoss(torch.autograd.Function):
    """:func:`trained_head_loss` names the arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor,
        labels: Tensor,
        first: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        size = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        trained = slice(first, first + len(rows))
        columns = torch.arange(weight.shape[0], device=hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden, d_rows = torch.empty_like(hidden), torch.zeros_like(rows)
        for start in range(0, len(hidden), size):
            h, label = hidden[start : start + size], labels[start : start + size, None]
            learned = label != IGNORED
            label = label.clamp(min=0)
            z = (h @ weight.t()).float().mul_(scale)
            slope = None
            if softcap is not None:
                z.div_(softcap).tanh_()
                slope = 1.0 - z * z
                z *= softcap
            losses = torch.logsumexp(z, 1, keepdim=True) - z.gather(1, label)
            total += torch.where(learned, losses, 0.0).sum()
            d_z = torch.softmax(z, 1)
            # No scatter_add_, which PyTorch does not promise the same bits of on a GPU.
            d_z -= (columns == label).float()
            if slope is not None:
                d_z *= slope
            d_z = torch.where(learned, d_z * scale, 0.0).to(weight.dtype)
            d_hidden[start : start + size] = d_z @ weight
            d_rows += d_z[:, trained].t() @ h
        ctx.save_for_backward(d_hidden, d_rows)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        d_hidden, d_rows = ctx.saved_tensors
        scaled = (d_hidden.float() * grads[0]).to(d_hidden.dtype)
        return scaled, None, d_rows * grads[0], *(None,) * 4


def trained_head_loss(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    labels: Tensor,
    *,
    first: int,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum of the cross-entropies of ``hidden`` [n, H], fp32 scalar.

    ``weight`` [V, H] in the type of the products, in which the trained ``rows`` fp32 [m, H] stand
    from ``first`` on; ``labels`` int64 [n], -100 where nothing is learned.
    """
    return _TrainedHeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden.to(weight.dtype), weight, rows, labels, first, scale, softcap
    )
