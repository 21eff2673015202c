"""The functions of :mod:`halfbyte.kernels.lora_group` on PyTorch's own products.

The reference, and the way on GPUs whose matrix units Triton does not know (a T4).
"""

from __future__ import annotations

from torch import Tensor

from halfbyte.kernels.dropout import keep_mask
from halfbyte.kernels.lora_group import Fold, LoraGroup, LoraPart


def lora_down(x: Tensor, group: LoraGroup, keys: Tensor | None) -> None:
    """As :func:`halfbyte.kernels.lora_group.lora_down`."""
    k, r = group.columns, group.r
    for i, part in enumerate(group.parts):
        a = group.views(group.shadow, part)[0]
        x[:, k + i * r : k + (i + 1) * r] = _dropped(x[:, :k], group, part, keys) @ a.t()
    x[:, k + len(group.parts) * r :] = 0.0


def lora_grad_input(d_x: Tensor, group: LoraGroup, keys: Tensor | None) -> None:
    """As :func:`halfbyte.kernels.lora_group.lora_grad_input`."""
    k, r = group.columns, group.r
    for i, part in enumerate(group.parts):
        g, a = d_x[:, k + i * r : k + (i + 1) * r], group.views(group.shadow, part)[0]
        d_x[:, :k] += _dropped(g @ a, group, part, keys)


def lora_grads(x: Tensor, d_x: Tensor, d_y: Tensor, group: LoraGroup, keys: Tensor | None) -> None:
    """As :func:`halfbyte.kernels.lora_group.lora_grads`."""
    k, r = group.columns, group.r
    for i, part in enumerate(group.parts):
        columns = slice(k + i * r, k + (i + 1) * r)
        grad_a, grad_b = group.views(group.grad, part)
        grad_a += d_x[:, columns].t() @ _dropped(x[:, :k], group, part, keys)
        rows = slice(part.first_row, part.first_row + part.rows)
        grad_b += (d_y[:, rows].t() @ x[:, columns]).float() * group.scale


def fold_b(fold: Fold) -> None:
    """As :func:`halfbyte.kernels.lora_group.fold_b`."""
    for group, weight in fold.entries:
        for i, part in enumerate(group.parts):
            first = group.columns + i * group.r
            rows = slice(part.first_row, part.first_row + part.rows)
            weight[rows, first : first + group.r] = group.views(group.values, part)[1] * group.scale


def _dropped(x: Tensor, group: LoraGroup, part: LoraPart, keys: Tensor | None) -> Tensor:
    if keys is None or group.p == 0.0:
        return x
    mask = keep_mask(tuple(x.shape), group.p, keys[part.module], x.device, x.dtype)
    return x * mask.mul_(group.keep_scale)
