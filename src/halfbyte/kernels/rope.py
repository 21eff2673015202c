"""Rotary position embedding (Su et al., 2021) in place, in the rotate-half convention of Llama.

The halves x1 and x2 of each head's vector are turned by the angles of the token's position:

    x1' = x1 · cos - x2 · sin         x2' = x2 · cos + x1 · sin

The backward pass is the transposed rotation, which is the one by the negative angles.

Bound by memory: each value is read and written once, and the tables, which hold the positions of a
batch many times over, come from L1 and L2. A program turns 1024 pairs of values of consecutive
heads, 8 a thread, so that halves of 32 or 64 values make 16-byte accesses and the number of heads
need not be a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.triton_shim import tl, triton

_PAIRS = 1024  # of values, in one program of four warps


def rope_reference_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    heads: int,
    head_dim: int,
    *,
    inverse: bool = False,
) -> None:
    """What :func:`rope_` does, in plain PyTorch."""
    c, s = cos[position_ids.long()][:, None], sin[position_ids.long()][:, None]
    if inverse:
        s = -s
    x = qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    x1, x2 = x.to(torch.float32, copy=True).chunk(2, dim=-1)
    turned = x1 * c - x2 * s, x2 * c + x1 * s
    for half, value in zip(x.chunk(2, dim=-1), turned, strict=True):
        half.copy_(value)


@triton.jit(do_not_specialize=["tokens"])
def _rope(  # type: ignore[no-untyped-def]
    qkv,
    cos,
    sin,
    position_ids,
    tokens,
    stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of a token's head
    token = index // HEADS
    valid = token < tokens
    position = tl.load(position_ids + token, mask=valid, other=0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = valid[:, None] & (column < HALF)
    angle = (position * HALF)[:, None] + column
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    if INVERSE:
        s = -s
    start = tl.multiple_of(token.to(tl.int64) * stride, ALIGNED) + (index % HEADS) * (2 * HALF)
    first = qkv + start[:, None] + column
    x1 = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(first + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(first, (x1 * c - x2 * s).to(qkv.dtype.element_ty), mask=inside)
    tl.store(first + HALF, (x2 * c + x1 * s).to(qkv.dtype.element_ty), mask=inside)


def rope_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    heads: int,
    head_dim: int,
    *,
    inverse: bool = False,
) -> None:
    """Turn the first ``heads · head_dim`` columns of ``qkv`` [T, W] in place.

    Those are the query heads and then the key heads; the columns after them stay as they are. The
    rows may have any stride. ``cos`` and ``sin`` are fp32 [positions, head_dim / 2], contiguous;
    ``position_ids`` [T] int32 or int64 names the row of each token, below ``positions``.
    ``inverse`` turns back.
    """
    tokens, width = qkv.shape
    assert qkv.stride(1) == 1
    assert heads * head_dim <= width
    assert head_dim % 2 == 0
    assert position_ids.shape == (tokens,)
    assert position_ids.is_contiguous()
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert cos.shape == sin.shape == (cos.shape[0], head_dim // 2)
    block = triton.next_power_of_2(head_dim // 2)
    rows = max(_PAIRS // block, 1)
    _rope[(triton.cdiv(tokens * heads, rows),)](
        qkv,
        cos,
        sin,
        position_ids,
        tokens,
        qkv.stride(0),
        HEADS=heads,
        HALF=head_dim // 2,
        ROWS=rows,
        BLOCK=block,
        ALIGNED=8 if qkv.stride(0) % 8 == 0 else 1,
        INVERSE=inverse,
        num_warps=4,
    )
