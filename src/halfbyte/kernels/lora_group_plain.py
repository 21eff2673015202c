"""The functions of :mod:`halfbyte.kernels.lora_group` on PyTorch's own products.

The reference, and, with a kernel for the masks, the way on GPUs whose matrix units Triton does not
know (a T4): ``apply`` is :func:`~halfbyte.kernels.dropout.apply_dropout` there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.kernels.dropout import apply_dropout_reference
from halfbyte.kernels.lora_group import Fold, LoraGroup

Apply = Callable[..., None]


def lora_down(
    x: Tensor, group: LoraGroup, keys: Tensor | None, *, apply: Apply = apply_dropout_reference
) -> None:
    """As :func:`halfbyte.kernels.lora_group.lora_down`."""
    k, r = group.columns, group.r
    kept = torch.empty_like(x[:, :k])
    for i, part in enumerate(group.parts):
        a = group.views(group.shadow, part)[0]
        value = x[:, :k]
        if keys is not None and group.p > 0.0:
            apply(value, keys[part.module], group.p, kept)
            value = kept
        torch.mm(value, a.t(), out=x[:, k + i * r : k + (i + 1) * r])
    x[:, k + len(group.parts) * r :] = 0.0


def lora_grad_input(
    d_x: Tensor, group: LoraGroup, keys: Tensor | None, *, apply: Apply = apply_dropout_reference
) -> None:
    """As :func:`halfbyte.kernels.lora_group.lora_grad_input`."""
    k, r = group.columns, group.r
    for i, part in enumerate(group.parts):
        g, a = d_x[:, k + i * r : k + (i + 1) * r], group.views(group.shadow, part)[0]
        if keys is not None and group.p > 0.0:
            apply(g @ a, keys[part.module], group.p, d_x[:, :k], accumulate=True)
        else:
            d_x[:, :k] += g @ a


def lora_grads(
    x: Tensor,
    d_x: Tensor,
    d_y: Tensor,
    group: LoraGroup,
    keys: Tensor | None,
    *,
    apply: Apply = apply_dropout_reference,
) -> None:
    """As :func:`halfbyte.kernels.lora_group.lora_grads`."""
    k, r = group.columns, group.r
    kept = torch.empty_like(x[:, :k])
    for i, part in enumerate(group.parts):
        columns = slice(k + i * r, k + (i + 1) * r)
        grad_a, grad_b = group.views(group.grad, part)
        value = x[:, :k]
        if keys is not None and group.p > 0.0:
            apply(value, keys[part.module], group.p, kept)
            value = kept
        grad_a += d_x[:, columns].t() @ value
        rows = slice(part.first_row, part.first_row + part.rows)
        grad_b.add_(d_y[:, rows].t() @ x[:, columns], alpha=group.scale)


def fold_b(fold: Fold) -> None:
    """As :func:`halfbyte.kernels.lora_group.fold_b`."""
    for group, weight in fold.entries:
        for i, part in enumerate(group.parts):
            first = group.columns + i * group.r
            rows = slice(part.first_row, part.first_row + part.rows)
            weight[rows, first : first + group.r] = group.views(group.values, part)[1] * group.scale
