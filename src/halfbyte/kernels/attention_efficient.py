"""Variable-length causal attention by PyTorch's own memory-efficient kernels (CUTLASS).

For GPUs whose matrix instructions Triton does not know (Turing, sm_75) or that have no Triton: the
same two functions as :mod:`halfbyte.kernels.attention` with the same arguments, on the operator
behind ``scaled_dot_product_attention``, which takes rows that lie end to end and reads where they
begin on the device. Two differences: ``lse`` has each row's log-sums apart, padded to a multiple of
32, as :func:`lse_shape` says; and the kernels know no grouped heads, so keys and values are
repeated for each query head, and the gradients of the copies added. It allocates those, the output
and the gradients, some 6 · T · heads · head_dim elements, and may be captured in a CUDA graph.

The backward pass goes through a row's keys in one split, so that no two programs add to the same
gradient: the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

CAUSAL_FROM_TOP_LEFT = 1  # the operator's custom_mask_type
LSE_ALIGNMENT = 32


def lse_shape(T: int, rows: int, max_seqlen: int, heads: int) -> tuple[int, ...]:
    """The shape of ``lse``, which the caller allocates in fp32."""
    return rows, heads, -(-min(max_seqlen, T) // LSE_ALIGNMENT) * LSE_ALIGNMENT


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
    *,
    window: int | None = None,
) -> None:
    """:func:`halfbyte.kernels.attention.attention`, but for the shape of ``lse``."""
    T = len(qkv)
    if T == 0:
        return
    longest = min(max_seqlen, T)  # the operator refuses a bound beyond T
    q, k, v = _split(qkv, heads, kv_heads, head_dim)
    found, sums, *_ = torch.ops.aten._efficient_attention_forward(
        q,
        k,
        v,
        None,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        0.0,
        CAUSAL_FROM_TOP_LEFT,
        True,
        scale=scale,
        window_size=_window(window, longest),
    )
    out.copy_(found.view(T, heads * head_dim))
    lse.copy_(sums)


def attention_backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    d_qkv: Tensor,
    delta: Tensor,
    *,
    window: int | None = None,
) -> None:
    """:func:`halfbyte.kernels.attention.attention_backward`; ``delta`` is not used."""
    T = len(qkv)
    if T == 0:
        return
    longest = min(max_seqlen, T)
    q, k, v = _split(qkv, heads, kv_heads, head_dim)
    # Without dropout the generator's state is not read.
    no_state = torch.empty((), dtype=torch.int64, device=qkv.device)
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        d_out.contiguous().view(1, T, heads, head_dim),
        q,
        k,
        v,
        None,
        out.contiguous().view(1, T, heads, head_dim),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        lse,
        0.0,
        no_state,
        no_state,
        CAUSAL_FROM_TOP_LEFT,
        False,
        scale=scale,
        num_splits_key=1,
        window_size=_window(window, longest),
    )
    d_heads = d_qkv.unflatten(1, (heads + 2 * kv_heads, head_dim))
    d_heads[:, :heads] = dq[0]
    for first, grad in ((heads, dk), (heads + kv_heads, dv)):
        copies = grad.view(T, kv_heads, heads // kv_heads, head_dim)
        torch.sum(copies, 2, out=d_heads[:, first : first + kv_heads])


def _split(qkv: Tensor, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as [1, T, heads, head_dim]; of q a view."""
    parts = qkv.unflatten(1, (heads + 2 * kv_heads, head_dim)).unsqueeze(0)
    q, k, v = parts.split([heads, kv_heads, kv_heads], dim=2)
    group = heads // kv_heads
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    return q, k, v


def _window(window: int | None, longest: int) -> int | None:
    """None where the window hides nothing."""
    return None if window is None or window >= longest else window
