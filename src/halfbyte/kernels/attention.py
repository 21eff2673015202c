"""Causal attention over rows that lie end to end, forward and backward, the same bits every time.

For a row's queries i and keys j, with grouped heads (several query heads share a key head):

    s_ij = scale · q_i · k_j            where i - window < j ≤ i, else -∞
    lse_i = ln Σ_j exp s_ij             p_ij = exp(s_ij - lse_i)
    out_i = Σ_j p_ij v_j

and backward, with delta_i = out_i · d_out_i = Σ_j p_ij (d_out_i · v_j):

    dv_j = Σ_i p_ij d_out_i             ds_ij = p_ij (d_out_i · v_j - delta_i)
    dq_i = scale · Σ_j ds_ij k_j        dk_j = scale · Σ_i ds_ij q_i

where the sums over i of dk and dv run over all query heads of the group as well. Scores never stand
in memory: a tile of queries goes through the keys with a running maximum and sum, and the backward
pass makes p again from lse (FlashAttention 2, Dao, 2023, arXiv 2307.08691). Sums are in fp32; p and
ds are rounded to the type of qkv for their products, as FlashAttention does.

No atomics: each element of dq, dk and dv is one program's sum in a fixed order. Where a batch has
so few keys that a program a key head and tile would leave most of the GPU idle, a group's heads
are divided among programs, whose sums a second kernel adds in order. How they are divided follows
from the shapes alone, never from the device or from where rows begin.

In all functions: ``qkv`` [T, (heads + 2 · kv_heads) · head_dim], rotated, query heads first, then
key heads, then value heads, in c (bf16, fp16 or fp32); ``out``, ``d_out`` [T, heads · head_dim] and
``d_qkv`` like qkv, all in c with any row stride; ``lse`` fp32 as :func:`lse_shape` says and
``delta`` fp32 [heads, T], contiguous; ``cu_seqlens`` int32 [rows + 1] on the device, from 0 to T,
rows of no tokens allowed; ``max_seqlen`` an upper bound of the rows' lengths (only block sizes
follow from it); ``window`` the number of last positions that are seen, the own one counted.
Launchers may be captured in a CUDA graph: the grid follows from T, rows and heads.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels.attention_kernels import (
    backward_kernel,
    delta_kernel,
    forward_kernel,
    sum_parts_kernel,
)
from halfbyte.kernels.triton_shim import triton

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
SHORT = 512  # tokens: up to here a row has so few blocks that latency is what counts
# Three programs for each multiprocessor of the largest GPUs (132). A constant, since the order of
# sums must not depend on the card.
ENOUGH_PROGRAMS = 384
# A block may have 163 KiB of shared memory on the first and more on the others, against 99 KiB on
# consumers' cards (sm_86, sm_89, sm_120).
ROOMY = ((8, 0), (9, 0), (10, 0))


class Tiles(NamedTuple):
    """How a kernel is cut and compiled."""

    block: int  # tokens of a program's tile
    step: int  # tokens that its loop takes at a time; divides block
    warps: int
    stages: int  # of the load pipeline
    split_loop: bool  # blocks without masks in a loop of their own


def lse_shape(T: int, rows: int, max_seqlen: int, heads: int) -> tuple[int, ...]:
    """The shape of ``lse``, which the caller allocates in fp32."""
    return heads, T


def forward_tiles(head_dim: int, max_seqlen: int, element_size: int, roomy: bool) -> Tiles:
    """The forward kernel's tiles; shared memory holds q and ``stages`` blocks of k and v.

    Within 99 KiB unless ``roomy``.
    """
    width = triton.next_power_of_2(head_dim)
    if element_size == 4:
        # Without matrix instructions (products of fp32 are exact here) registers are the limit.
        return Tiles(32 if width <= 128 else 16, 16, 4, 1, False)
    if width == 256:
        # A tile's sums take 128 registers a thread even with 8 warps and 128 queries.
        return Tiles(64, 32, 4, 2, max_seqlen > SHORT)
    if max_seqlen <= SHORT:
        # Rows of one to eight blocks: many small programs, all of them running at once.
        return Tiles(64, 64, 4, 2, False)
    if width == 128:
        # Two warp groups of 64 queries each, so that a thread holds 64 sums, not 128.
        return Tiles(128, 64, 8, 3 if roomy else 2, True)
    # One warp group with 128 queries reads each key and value half as often.
    return Tiles(128, 64, 4, 3, True)


def backward_tiles(head_dim: int, max_seqlen: int, element_size: int, roomy: bool) -> Tiles:
    """The backward kernel's tiles; shared memory holds two tiles and ``stages`` pairs of blocks.

    Within 99 KiB unless ``roomy``.
    """
    width = triton.next_power_of_2(head_dim)
    if element_size == 4:
        return Tiles(32 if width <= 128 else 16, 16, 4, 1, False)
    if width == 256:
        # With 64 keys the sums of dk and dv alone fill a thread's registers, and spill.
        return Tiles(32, 32, 8, 2, max_seqlen > SHORT)
    if width == 128:
        if max_seqlen <= SHORT:
            # Steps of 32, since dk and dv take 128 registers of a thread.
            return Tiles(64, 32, 4, 2, False)
        return Tiles(128, 64 if roomy else 32, 8, 2, True)
    if max_seqlen <= SHORT:
        # At 246 registers a thread two programs fit on a multiprocessor, and no more of them.
        return Tiles(64, 64, 4, 2, False)
    return Tiles(128, 64, 8, 3, True)


def key_splits(tiles: int, heads: int, kv_heads: int) -> int:
    """Among how many programs the query heads of a key head and tile are divided."""
    group = heads // kv_heads
    for splits in range(1, group):
        if group % splits == 0 and tiles * kv_heads * splits >= ENOUGH_PROGRAMS:
            return splits
    return group


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
    """Write ``out`` and ``lse``, the natural logarithm of the sum of exponentials of the scores."""
    T, rows = len(qkv), len(cu_seqlens) - 1
    if T == 0:
        return
    cut = forward_tiles(head_dim, max_seqlen, qkv.element_size(), _roomy(qkv))
    seen = _window(window, max_seqlen)
    forward_kernel[(heads, T // cut.block + rows)](
        qkv, cu_seqlens, out, lse, rows, T, qkv.stride(0), out.stride(0), scale,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, D=triton.next_power_of_2(head_dim),
        WINDOW=seen, ROWS=_rows_block(rows), BLOCK=cut.block, STEP=cut.step,
        SPLIT_LOOP=cut.split_loop and not seen,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


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
    """Write ``d_qkv``, every element of it, and ``delta``.

    Small batches with grouped heads allocate fp32 sums of dk and dv: 12 MiB for TinyLlama at 768
    tokens, and with groups of 2ⁿ heads at most 4 · ENOUGH_PROGRAMS · block · head_dim elements.
    """
    T, rows = len(qkv), len(cu_seqlens) - 1
    if T == 0:
        return
    width = triton.next_power_of_2(head_dim)
    delta_kernel[(triton.cdiv(T, 64), heads)](
        d_out, out, delta, T, d_out.stride(0), out.stride(0),
        HEAD_DIM=head_dim, D=width, BLOCK=64, num_warps=4,
    )  # fmt: skip
    cut = backward_tiles(head_dim, max_seqlen, qkv.element_size(), _roomy(qkv))
    seen = _window(window, max_seqlen)
    tiles = T // cut.block + rows
    splits = key_splits(tiles, heads, kv_heads)
    keys_width = 2 * kv_heads * head_dim
    parts = qkv.new_empty((splits, T, keys_width), dtype=torch.float32) if splits > 1 else delta
    backward_kernel[(tiles * (kv_heads * splits + heads),)](
        d_out, qkv, lse, delta, cu_seqlens, d_qkv, parts, rows, T, tiles,
        d_out.stride(0), qkv.stride(0), d_qkv.stride(0), scale,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, D=width,
        WINDOW=seen, ROWS=_rows_block(rows), BLOCK=cut.block, STEP=cut.step,
        SPLIT_LOOP=cut.split_loop and not seen, SPLITS=splits,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if splits > 1:
        sum_parts_kernel[(T,)](
            parts, d_qkv[:, heads * head_dim :], T, d_qkv.stride(0),
            WIDTH=keys_width, BLOCK=triton.next_power_of_2(keys_width), SPLITS=splits,
            num_warps=4,
        )  # fmt: skip


def attention_reference(
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
    """:func:`attention` row by row, in fp32 (fp64 for fp64), with the scores in memory."""
    borders = cu_seqlens.tolist()
    for start, stop in pairwise(borders):
        row = qkv[start:stop].to(_wide(qkv.dtype))
        o, sums = _row_attention(row, heads, kv_heads, head_dim, scale, window)
        out[start:stop] = o
        lse[:, start:stop] = sums


def attention_backward_reference(
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
    """:func:`attention_backward` by autograd through the reference; ``lse`` is not used."""
    borders = cu_seqlens.tolist()
    wide = _wide(qkv.dtype)
    for start, stop in pairwise(borders):
        with torch.enable_grad():
            row = qkv[start:stop].detach().to(wide).requires_grad_()
            o, _ = _row_attention(row, heads, kv_heads, head_dim, scale, window)
        (d_qkv[start:stop],) = torch.autograd.grad(o, row, d_out[start:stop].to(wide))
    products = (out.to(wide) * d_out.to(wide)).view(len(qkv), heads, head_dim)
    delta.copy_(products.sum(-1).T)


def _row_attention(
    row: Tensor, heads: int, kv_heads: int, head_dim: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """One row [n, W] → [n, heads · head_dim] and the log-sums [heads, n]."""
    n = len(row)
    q, k, v = (
        part.unflatten(1, (-1, head_dim)).transpose(0, 1)
        for part in row.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    )
    k, v = (part.repeat_interleave(heads // kv_heads, dim=0) for part in (k, v))
    place = torch.arange(n, device=row.device)
    back = place[:, None] - place
    hidden = (back < 0) | (back >= (n if window is None else window))
    scores = (q @ k.mT * scale).masked_fill(hidden, float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, heads * head_dim)
    return out, scores.logsumexp(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _window(window: int | None, max_seqlen: int) -> int:
    """0 where the window hides nothing."""
    return 0 if window is None or window >= max_seqlen else window


def _rows_block(rows: int) -> int:
    """Rows that a program looks through at a time; one compiled kernel serves up to 128."""
    return max(128, triton.next_power_of_2(rows))


def _roomy(tensor: Tensor) -> bool:
    if tensor.device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(tensor.device) in ROOMY
