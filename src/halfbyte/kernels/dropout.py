"""Dropout masks that are a function of where they stand, not of a generator's state.

The mask of element ``i`` is 16 bits of a hash of (seed, optimizer step, micro-batch, module,
⌊i / 2⌋): the lower half for even i, the upper for odd, so that one hash serves two elements. A
mask made again in a recomputed forward pass, in the backward pass, in a resumed run or in a
captured graph is therefore the same bit for bit, and there is no generator state to save. The
hash is two rounds of MurmurHash3's 32-bit finalizer with two keys between them, so that the
streams of two modules are different permutations and not one stream shifted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    """Two 32-bit keys (as signed integers) of one module's mask in one forward pass."""
    h = 0x9E3779B9
    for part in (seed, step, micro_batch, module):
        h = _mix_int((h ^ part & _MASK_32) + 0x9E3779B9 & _MASK_32)
    return _signed(h), _signed(_mix_int(h ^ 0x7F4A7C15))


def keep_mask(
    shape: tuple[int, ...], p: float, key: tuple[int, int], device: torch.device
) -> Tensor:
    """Bool tensor of ``shape``: true where an element is kept, which is with probability 1 - p.

    p is rounded to a multiple of 2⁻¹⁶.
    """
    count = math.prod(shape)
    h = torch.arange((count + 1) // 2, dtype=torch.int32, device=device)
    h ^= key[0]
    _mix(h)
    h ^= key[1]
    _mix(h)
    # A signed 16-bit hash is uniform on [-2^15, 2^15): the lowest share p is dropped.
    return (h.view(torch.int16)[:count] >= round(p * 2**16) - 2**15).view(shape)


def dropout(x: Tensor, p: float, key: tuple[int, int]) -> Tensor:
    """``x`` with a share ``p`` of its elements zeroed and the rest scaled by 1 / (1 - p)."""
    mask = keep_mask(tuple(x.shape), p, key, x.device)
    return torch.where(mask, x * (1.0 / (1.0 - p)), torch.zeros((), dtype=x.dtype, device=x.device))
