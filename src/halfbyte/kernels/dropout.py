"""Dropout masks that are a function of where they stand, not of a generator's state.

The mask of element ``i`` is 16 bits of a hash of (seed, optimizer step, micro-batch, module,
⌊i / 2⌋): the lower half for even i, the upper for odd, so that one hash serves two elements. A
mask made again in a recomputed forward pass, in the backward pass, in a resumed run or in a
captured graph is therefore the same bit for bit, and there is no generator state to save. The
hash is MurmurHash3's 32-bit finalizer on ⌊i / 2⌋ · m + a, where m (odd) and a are the two keys of a
module's mask: with a multiplier of its own no stream is another one shifted or reordered.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbyte.kernels.triton_shim import tl, triton

_MASK_32 = 0xFFFFFFFF
_M1, _M2 = 0x85EBCA6B, 0xC2B2AE35


def _signed(value: int) -> int:
    """The int32 with the same bits as the unsigned ``value``."""
    value &= _MASK_32
    return value - (1 << 32) if value >= 1 << 31 else value


def _mix_int(h: int) -> int:
    h ^= h >> 16
    h = h * _M1 & _MASK_32
    h ^= h >> 13
    h = h * _M2 & _MASK_32
    return h ^ h >> 16


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's finalizer in place on int32 ``h``; torch's products wrap as C's do.

    ``>>`` of a signed tensor carries the sign in, so the bits that came in are masked off.
    """
    h ^= (h >> 16) & 0xFFFF
    h *= _signed(_M1)
    h ^= (h >> 13) & 0x7FFFF
    h *= _signed(_M2)
    h ^= (h >> 16) & 0xFFFF
    return h


def dropout_key(seed: int, step: int, micro_batch: int, module: int) -> tuple[int, int]:
    """The multiplier and the offset (32 bits, as signed integers) of one module's mask."""
    h = 0x9E3779B9
    for part in (seed, step, micro_batch, module):
        h = _mix_int((h ^ part & _MASK_32) + 0x9E3779B9 & _MASK_32)
    return _signed(_mix_int(h ^ 0x7F4A7C15) | 1), _signed(h)


def keep_mask(
    shape: tuple[int, ...],
    p: float,
    key: tuple[int, int] | Tensor,
    device: torch.device,
    dtype: torch.dtype = torch.bool,
) -> Tensor:
    """1 where an element is kept, which is with probability 1 - p, else 0: ``shape`` in ``dtype``.

    ``key`` is what :func:`dropout_key` gives, or a row of :func:`dropout_keys`, which the host need
    not know. p is rounded to a multiple of 2⁻¹⁶. On a CPU ask for the type of what it is
    multiplied with: 610 × 576 comparisons written as fp32 and one product take 70 µs there, the
    same written as bool and a torch.where take 270.
    """
    multiplier, offset = key
    count = math.prod(shape)
    h = torch.arange((count + 1) // 2, dtype=torch.int32, device=device)
    _mix(h.mul_(multiplier).add_(offset))
    # A signed 16-bit hash is uniform on [-2^15, 2^15): the lowest share p is dropped.
    kept = torch.empty(count, dtype=dtype, device=device)
    torch.ge(h.view(torch.int16)[:count], round(p * 2**16) - 2**15, out=kept)
    return kept.view(shape)


def dropout(x: Tensor, p: float, key: tuple[int, int] | Tensor) -> Tensor:
    """``x`` with a share ``p`` of its elements zeroed and the rest scaled by 1 / (1 - p)."""
    return x * keep_mask(tuple(x.shape), p, key, x.device, x.dtype) * (1.0 / (1.0 - p))


def apply_dropout_reference(
    x: Tensor, key: Tensor, p: float, out: Tensor, *, accumulate: bool = False
) -> None:
    """What :func:`apply_dropout` does, in plain PyTorch."""
    mask = keep_mask(tuple(x.shape), p, key, x.device, x.dtype)
    dropped = x * mask.mul_(1.0 / (1.0 - p))
    if accumulate:
        out += dropped
    else:
        out.copy_(dropped)


def apply_dropout(
    x: Tensor, key: Tensor, p: float, out: Tensor, *, accumulate: bool = False
) -> None:
    """``out`` [T, K] receives, or with ``accumulate`` is added, ``x`` [T, K] dropped and scaled.

    ``key`` int32 [2] is a row of :func:`dropout_keys`. Any row strides; K is even.
    """
    tokens, columns = x.shape
    block_t, block_k = 4, min(512, triton.next_power_of_2(columns))
    _apply_dropout[(triton.cdiv(tokens, block_t), triton.cdiv(columns, block_k))](
        x,
        out,
        key,
        tokens,
        x.stride(0),
        out.stride(0),
        1.0 / (1.0 - p),
        drop_threshold(p),
        K=columns,
        ACCUMULATE=accumulate,
        BT=block_t,
        BK=block_k,
        num_warps=4,
    )


def drop_threshold(p: float) -> int:
    """An element is dropped where its 16 bits, taken as an unsigned number, lie below this."""
    return round(p * 2**16)


def dropout_keys_reference(seed: int, position: Tensor, keys: Tensor) -> None:
    """:func:`dropout_keys` through the host."""
    step, micro_batch = position.tolist()
    found = [dropout_key(seed, step, micro_batch, module) for module in range(len(keys))]
    keys.copy_(torch.tensor(found, dtype=torch.int32))


def dropout_keys(seed: int, position: Tensor, keys: Tensor) -> None:
    """Write the keys of all modules' masks into ``keys`` int32 [modules, 2].

    ``position`` int64 [2] holds step and micro-batch on the device, so that a captured graph makes
    new masks each time it is replayed.
    """
    block = triton.next_power_of_2(len(keys))
    _dropout_keys[(1,)](position, keys, seed & _MASK_32, len(keys), BLOCK=block)


@triton.jit
def mix_32(h: tl.tensor) -> tl.tensor:
    """MurmurHash3's finalizer of uint32 ``h``."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def kept_pairs(pair, multiplier, offset, threshold):  # type: ignore[no-untyped-def]
    """Whether the even and the odd element of each pair (its number, uint32) is kept."""
    h = mix_32(pair * multiplier + offset)
    # A signed number that is not below threshold - 2^15 is, with its top bit turned, an unsigned
    # one that is not below threshold.
    even = ((h & 0xFFFF) ^ 0x8000) >= threshold
    odd = ((h >> 16) ^ 0x8000) >= threshold
    return even, odd


@triton.jit
def kept_tile(rows, first, multiplier, offset, threshold, K: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mask of a tile of a [T, K] tensor: [rows, BK] from column ``first``, an even one, on."""
    column = (first // 2 + tl.arange(0, BK // 2)).to(tl.uint32)
    pair = rows.to(tl.uint32)[:, None] * (K // 2) + column[None, :]
    even, odd = kept_pairs(pair, multiplier, offset, threshold)
    return tl.interleave(even, odd)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["key"])
def _apply_dropout(  # type: ignore[no-untyped-def]
    x,
    out,
    key,
    T,
    stride_x,
    stride_out,
    keep_scale,
    threshold,
    K: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * BK
    columns = first + tl.arange(0, BK)
    mask = (rows < T)[:, None] & (columns < K)[None, :]
    multiplier = tl.load(key).to(tl.uint32, bitcast=True)
    offset = tl.load(key + 1).to(tl.uint32, bitcast=True)
    kept = kept_tile(rows, first, multiplier, offset, threshold, K, BK)
    at = rows.to(tl.int64)[:, None]
    value = tl.load(x + at * stride_x + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.where(kept, value * keep_scale, 0.0)
    to = out + at * stride_out + columns[None, :]
    if ACCUMULATE:
        value += tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["position"])
def _dropout_keys(position, keys, seed, modules, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    module = tl.arange(0, BLOCK)
    h = tl.full((BLOCK,), 0x9E3779B9, tl.uint32)
    h = mix_32((h ^ seed.to(tl.uint32)) + 0x9E3779B9)
    h = mix_32((h ^ tl.load(position).to(tl.uint32)) + 0x9E3779B9)
    h = mix_32((h ^ tl.load(position + 1).to(tl.uint32)) + 0x9E3779B9)
    h = mix_32((h ^ module.to(tl.uint32)) + 0x9E3779B9)
    multiplier = mix_32(h ^ 0x7F4A7C15) | 1
    tl.store(keys + 2 * module, multiplier.to(tl.int32, bitcast=True), mask=module < modules)
    tl.store(keys + 2 * module + 1, h.to(tl.int32, bitcast=True), mask=module < modules)
