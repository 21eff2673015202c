"""Attention over rows that lie end to end, by kernels that read where rows begin on the device.

:mod:`halfbyte.model.attention` goes from row to row on the host, which has to know the borders and
launches a few kernels for each row. Here a whole batch is one launch each way, and the host knows
nothing but shapes, so that the step may be captured in a CUDA graph. This is for the layers that
transformers runs; fused ones (:mod:`halfbyte.model.fused_layer`) call the kernels themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels import attention as by_triton
from halfbyte.kernels.choice import Kernels

ALIGNMENT = 8  # elements: a head of 16-bit numbers is then read in pieces of 16 bytes


class NoKernelError(Exception):
    """Why there is no kernel for a model's attention."""


@dataclass(frozen=True)
class DeviceRows:
    """Where the rows of a batch lie; see :class:`halfbyte.data.batch.Batch`."""

    cu_seqlens: Tensor  # int32 [rows + 1] on the device
    max_seqlen: int
    kernels: Kernels


def attention_on_device(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: DeviceRows,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Causal self-attention within each row: [1, T, heads, D] in the value's type.

    ``query`` [1, heads, T, D]; ``key``, ``value`` [1, kv_heads, T, D]; query and key may be in
    fp32 beside a value in 16 bits and are rounded to its type, the type of the products. ``scale``
    is 1/√D where it is None. Raises NoKernelError for shapes that no kernel takes.
    """
    head_dim = query.shape[-1]
    if value.shape != key.shape or key.shape[-1] != head_dim or query.shape[1] % key.shape[1]:
        raise NoKernelError("queries, keys and values have heads of different sizes or numbers")
    triton = rows.kernels.attention is by_triton.attention
    if head_dim % ALIGNMENT or (triton and head_dim not in by_triton.HEAD_DIMS):
        raise NoKernelError(f"its attention has heads of {head_dim} elements")
    scale = head_dim**-0.5 if scale is None else scale
    return _Attention.apply(query, key, value, rows, scale, window)  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    """Saved for the backward pass: q, k and v in one tensor, the output, and its log-sums."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: DeviceRows,
        scale: float,
        window: int | None,
    ) -> Tensor:
        (_, heads, tokens, head_dim), kv_heads = query.shape, key.shape[1]
        kernels, longest = rows.kernels, rows.max_seqlen
        qkv = value.new_empty(tokens, (heads + 2 * kv_heads) * head_dim)
        for part, given in zip(_parts(qkv, heads, kv_heads), (query, key, value), strict=True):
            part.copy_(given)
        out = value.new_empty(tokens, heads * head_dim)
        shape = kernels.attention_lse_shape(tokens, len(rows.cu_seqlens) - 1, longest, heads)
        lse = torch.empty(shape, dtype=torch.float32, device=value.device)
        ctx.call = (longest, heads, kv_heads, head_dim, scale)
        kernels.attention(qkv, rows.cu_seqlens, *ctx.call, out, lse, window=window)
        ctx.save_for_backward(qkv, out, lse, rows.cu_seqlens)
        ctx.kernels, ctx.window = kernels, window
        ctx.dtypes = (query.dtype, key.dtype, value.dtype)
        return out.view(1, tokens, heads, head_dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        qkv, out, lse, cu_seqlens = ctx.saved_tensors
        heads, kv_heads = ctx.call[1:3]
        d_out = grads[0].reshape(out.shape).contiguous()
        d_qkv = torch.empty_like(qkv)
        delta = torch.empty(heads, len(qkv), dtype=torch.float32, device=qkv.device)
        ctx.kernels.attention_backward(
            d_out, qkv, out, lse, cu_seqlens, *ctx.call, d_qkv, delta, window=ctx.window
        )
        parts = _parts(d_qkv, heads, kv_heads)
        return *(p.to(dtype) for p, dtype in zip(parts, ctx.dtypes, strict=True)), None, None, None


def _parts(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """q, k and v of [T, W] as [1, heads, T, D]: views, laid out as transformers has them."""
    by_head = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).transpose(0, 1).unsqueeze(0)
    return by_head.split([heads, kv_heads, kv_heads], dim=1)
