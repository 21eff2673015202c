"""Cross-entropy from hidden states, without ever holding all logits.

    L = Σ_t ( logsumexp(z_t) - z_t[label_t] ),   z_t = cap(scale · h_t Wᵀ)

The head's matrix W [vocab, hidden] is frozen, so the only gradient wanted is dL/dh, and it can be
made while the logits of a chunk are still there: dL/dz = softmax(z) - onehot(label), dL/dh =
dL/dz · W. The forward pass therefore does all the work, the backward pass scales its result, and
memory holds one chunk of logits (Hsu et al., 2024, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 128 * 1024**2  # of fp32 logits in memory at once


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        need_grad = ctx.needs_input_grad[0]
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if need_grad else None
        for start in range(0, hidden.shape[0], rows):
            h, label = hidden[start : start + rows], labels[start : start + rows, None]
            z = torch.nn.functional.linear(h, weight).float()
            if scale != 1.0:
                z *= scale
            if softcap is not None:
                z = softcap * torch.tanh(z / softcap)
            log_sum = torch.logsumexp(z, dim=1, keepdim=True)
            total += (log_sum - z.gather(1, label)).sum()
            if grad is not None:
                d_z = torch.exp(z - log_sum)
                d_z.scatter_add_(1, label, torch.full_like(log_sum, -1.0))
                if softcap is not None:
                    d_z *= 1.0 - (z / softcap) ** 2
                if scale != 1.0:
                    d_z *= scale
                grad[start : start + rows] = d_z.to(weight.dtype) @ weight
        ctx.grad = grad
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        # In fp32: a loss scale of 2^16 alone is more than fp16 holds.
        return (ctx.grad.float() * grads[0]).to(ctx.grad.dtype), None, None, None, None


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_labels: int,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum of the cross-entropies at the labelled positions, fp32 scalar.

    ``hidden`` [T, H]; ``weight`` [V, H] in the type of the products; ``labels`` int64 [T], -100
    where nothing is learned, ``num_labels`` the number of others (given, so that a GPU need not be
    waited for). Only labelled positions meet the head.
    """
    at = torch.nonzero_static(labels != -100, size=num_labels).squeeze(1)
    chosen = hidden.index_select(0, at).to(weight.dtype)
    return _ChunkedCrossEntropy.apply(chosen, weight, labels.index_select(0, at), scale, softcap)
