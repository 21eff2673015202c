"""NF4 codes to a matrix of 16-bit values in one pass: what a product of a frozen weight reads.

    w_i = round_c( CODE_BOOK[code_i] · scale )

    scale = absmax,  or with double quantization  DYNAMIC_MAP[absmax] · nested + offset

(see :mod:`halfbyte.kernels.nf4`). Products and sums are single fp32 operations in bitsandbytes'
order, so the values equal its own bit for bit. There the scale is a kernel's product and then
another kernel's sum, while a compiler makes one fused multiply-add of the two, which rounds once
instead of twice: the kernel is compiled with ``enable_fp_fusion=False``.

Bound by memory: 0.5 bytes a value come in, 2 go out, and 1/64 of a scale. A thread takes words of
8 codes, whose values fill one 16-byte store. The code book is a table in memory, one cache line
that stays in L1, read once a value. Selecting among 16 constants by the four bits instead takes 19
instructions a value, of a kind of which a multiprocessor of an H100 does 64 a cycle: by count 1.5
times as long as the bytes take.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from halfbyte.kernels.nf4 import (
    CODE_BOOK,
    SCALES_PER_BLOCK,
    dequantize_blocks,
    dequantize_scales,
    dynamic_map,
)
from halfbyte.kernels.triton_shim import tl, triton

_LAST = 2**31 - 1  # where a part begins that there is not: after every block
_VALUES = 2048  # in one program of four warps
_MOST_PARTS = 4


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The code book and the dynamic map, fp32, on ``device``."""
    book = torch.tensor(CODE_BOOK, dtype=torch.float32)
    return book.to(device), dynamic_map(signed=True).to(device)


def nf4_dequantize_reference(
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offsets: Tensor | None,
    part_blocks: tuple[int, ...],
    block_size: int,
    rows: int,
    columns: int,
    out: Tensor,
) -> None:
    """What :func:`nf4_dequantize` does, in plain PyTorch."""
    scales = absmax
    if nested is not None:
        assert offsets is not None
        ends = (*part_blocks[1:], absmax.numel())
        parts = []
        for number, (first, end) in enumerate(zip(part_blocks, ends, strict=True)):
            mine = nested[first // SCALES_PER_BLOCK : -(-end // SCALES_PER_BLOCK)]
            parts.append(dequantize_scales(absmax[first:end], mine, offsets[number]))
        scales = torch.cat(parts)
    flat = dequantize_blocks(codes, scales, block_size, rows * columns, out.dtype)
    out[:, :columns] = flat.view(rows, columns)


@triton.jit(do_not_specialize=["rows", "second", "third", "fourth"])
def _nf4_dequantize(  # type: ignore[no-untyped-def]
    codes,
    absmax,
    nested,
    offsets,
    out,
    book,
    dynamic,
    rows,
    second,
    third,
    fourth,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALES: tl.constexpr,
    CODES: tl.constexpr,
    WORDS: tl.constexpr,
):
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    # A row's words are a multiple of four, which the compiler has to see to load several at once.
    inside = word < rows * (COLUMNS // CODES)
    packed = tl.load(codes + word, mask=inside, other=0, eviction_policy="evict_first")
    block = word // (BLOCK_SIZE // CODES)
    scale = tl.load(absmax + block, mask=inside, other=0)
    if nested is not None:
        part = (block >= second).to(tl.int32) + (block >= third) + (block >= fourth)
        product = tl.load(dynamic + scale.to(tl.int32)) * tl.load(
            nested + block // SCALES, mask=inside, other=0.0
        )
        scale = product + tl.load(offsets + part, mask=inside, other=0.0)
    # In a word the lower byte comes first, in a byte the higher half.
    place = tl.arange(0, CODES)
    code = (packed.to(tl.int32)[:, None] >> ((place ^ 1) * 4)[None, :]) & 15
    value = tl.load(book + code) * scale[:, None]
    row = (word // (COLUMNS // CODES)).to(tl.int64)
    start = row * STRIDE + word % (COLUMNS // CODES) * CODES
    tl.store(
        out + start[:, None] + place[None, :], value.to(out.dtype.element_ty), mask=inside[:, None]
    )


def nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offsets: Tensor | None,
    part_blocks: tuple[int, ...],
    block_size: int,
    rows: int,
    columns: int,
    out: Tensor,
) -> None:
    """Fill the first ``columns`` of ``out`` [rows, ≥ columns], which may have any row stride.

    Up to four quantized matrices of the same number of columns, a multiple of the even
    ``block_size``, lie end to end by rows: ``codes`` uint8 [rows · columns / 2] and ``absmax``
    [blocks], fp32 with ``nested`` None, else uint8 with ``nested`` fp32 [⌈blocks / 256⌉] and
    ``offsets`` fp32 [parts]. ``part_blocks`` holds the first block of each matrix: 0, and with
    double quantization multiples of 256, so that no two share a scale of scales.

    The first call on a device makes two small tables there, which cannot happen inside a capture.
    """
    assert codes.is_contiguous()
    assert absmax.is_contiguous()
    assert codes.dtype == torch.uint8
    assert block_size % 2 == 0
    assert columns % block_size == 0
    assert codes.numel() * 2 == rows * columns
    assert absmax.numel() * block_size == rows * columns
    assert out.shape[0] == rows
    assert out.shape[1] >= columns
    assert out.stride(1) == 1
    assert part_blocks[0] == 0
    assert len(part_blocks) <= _MOST_PARTS
    if nested is None:
        assert absmax.dtype == torch.float32
    else:
        assert offsets is not None
        assert absmax.dtype == torch.uint8
        assert all(first % SCALES_PER_BLOCK == 0 for first in part_blocks)
        assert nested.numel() == -(-absmax.numel() // SCALES_PER_BLOCK)
        assert offsets.numel() == len(part_blocks)
    # Words need blocks of whole words and an aligned first one; bytes always do.
    per_word = 8 if block_size % 8 == 0 and codes.storage_offset() % 4 == 0 else 2
    book, dynamic = _tables(out.device)
    _nf4_dequantize[(triton.cdiv(rows * columns, _VALUES),)](
        codes.view(torch.int32) if per_word == 8 else codes,
        absmax,
        nested,
        offsets,
        out,
        book,
        dynamic,
        rows,
        *(*part_blocks[1:], _LAST, _LAST, _LAST)[: _MOST_PARTS - 1],
        COLUMNS=columns,
        STRIDE=out.stride(0),
        BLOCK_SIZE=block_size,
        SCALES=SCALES_PER_BLOCK,
        CODES=per_word,
        WORDS=_VALUES // per_word,
        num_warps=4,
        enable_fp_fusion=False,
    )
