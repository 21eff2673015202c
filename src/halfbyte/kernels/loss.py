"""Cross-entropy from hidden states, without ever holding all logits.

    L = Σ_t ( logsumexp(z_t) - z_t[label_t] ),   z_t = cap(scale · h_t Wᵀ)

The head's matrix W [vocab, hidden] is frozen, so the only gradient wanted is dL/dh, and it can be
made while the logits of a chunk are still there: dL/dz = softmax(z) - onehot(label), dL/dh =
dL/dz · W. The forward pass therefore does all the work, the backward pass scales its result, and
memory holds one chunk of logits (Hsu et al., 2024, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.cross_entropy import IGNORED

# Of fp32 logits in memory at once. Smaller chunks read the head's matrix more often: 610 tokens
# against 49,152 took 0.48 s with this and 0.54 s with 24 MiB on two AVX2 cores.
CHUNK_BYTES = 128 * 1024**2


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
        buffer = hidden.new_empty(min(rows, len(hidden)), weight.shape[0], dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if need_grad else None
        for start in range(0, len(hidden), rows):
            h, label = hidden[start : start + rows], labels[start : start + rows, None]
            # Everything below happens in this one piece of memory: each pass over it that makes
            # another of its size would cost as much as a quarter of the product.
            z = buffer[: len(h)]
            if weight.dtype == torch.float32:
                torch.mm(h, weight.t(), out=z)
            else:
                z.copy_(h @ weight.t())
            if scale != 1.0:
                z *= scale
            slope = None
            if softcap is not None:
                z.div_(softcap).tanh_()
                slope = 1.0 - z * z if need_grad else None
                z *= softcap
            chosen = z.gather(1, label)
            top = z.amax(dim=1, keepdim=True)
            sums = z.sub_(top).exp_().sum(dim=1, keepdim=True)
            total += (sums.log() + top - chosen).sum()
            if grad is None:
                continue
            z /= sums  # softmax(z)
            z.scatter_add_(1, label, torch.full_like(sums, -1.0))
            if slope is not None:
                z *= slope
            if scale != 1.0:
                z *= scale
            grad[start : start + rows] = z.to(weight.dtype) @ weight
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
    return _ChunkedCrossEntropy.apply(chosen, weight, labels.index_select(0, at), scale, softcap)  # type: ignore[no-untyped-call]


class _CrossEntropyAt(torch.autograd.Function):
    """:func:`cross_entropy_at` names the arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        label_index: Tensor,
        label_ids: Tensor,
        head_loss: Callable[..., Tensor],
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        every = len(label_index) >= len(hidden)
        chosen = hidden if every else hidden.index_select(0, label_index)
        chosen = chosen.to(weight.dtype)
        ctx.grad = torch.empty_like(chosen) if ctx.needs_input_grad[0] else None
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(None if every else labels)
        return head_loss(
            chosen,
            weight,
            labels if every else label_ids,
            torch.ones((), dtype=torch.float32, device=hidden.device),
            ctx.grad,
            scale=scale,
            softcap=softcap,
            chunk_bytes=CHUNK_BYTES,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad = (ctx.grad.float() * grads[0]).to(ctx.dtype)
        (labels,) = ctx.saved_tensors
        if labels is not None:
            # The k-th position with a label has the k-th gradient. Taken, not put: where several
            # are put at once a GPU must sort them first to put them in the same order every time.
            learned = labels != IGNORED
            at = (learned.cumsum(0) - 1).clamp_(0, len(grad) - 1)
            grad = torch.where(learned[:, None], grad.index_select(0, at), 0.0)
        return grad, *(None,) * 7


def cross_entropy_at(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_index: Tensor,
    label_ids: Tensor,
    head_loss: Callable[..., Tensor],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """:func:`cross_entropy_sum` by a kernel, the labelled positions given by their index.

    Only shapes are known to the host, so that a batch padded to a bucket is a matter of the device
    alone: ``labels``, ``label_index`` and ``label_ids`` are those of
    :class:`halfbyte.data.batch.Batch`. ``head_loss`` is
    :func:`halfbyte.kernels.cross_entropy.head_loss` or another that does the same.
    """
    return _CrossEntropyAt.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, label_index, label_ids, head_loss, scale, softcap
    )
