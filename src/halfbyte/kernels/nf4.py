"""4-bit NormalFloat: quantize and dequantize blocks (Dettmers et al., 2023, section 3).

A block of weights w shares one scale, absmax = max |w|; each weight is stored as the index of the
code-book value nearest to w / absmax, two to a byte, the first in the high half:

    code_i = #{ borders below w_i · (1 / absmax) },   w'_i = CODE_BOOK[code_i] · absmax

The code book holds the quantiles of a normal distribution, scaled to [-1, 1] with an exact zero.
Everything is computed in fp32 in bitsandbytes' order, so codes, scales and dequantized values
equal its own bit for bit on the same device. The scales can be quantized too (section 3, "double
quantization"): see :func:`quantize_scales`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from halfbyte.kernels.triton_shim import INSTALLED, tl, triton

# bitsandbytes' fp32 values; tests compare them with its own.
CODE_BOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Of the borders between codes those that differ in bitsandbytes' CUDA code, by index.
_CUDA_BORDERS = {0: -0.84809643, 8: 0.120255254, 12: 0.5016634, 14: 0.8614784}
SCALES_PER_BLOCK = 256  # scales that share a scale of their own

# Elements worked on at once: what is made on the way (fp32 values, indices) stays under 100 MB.
_CHUNK = 1 << 22


@cache
def _code_book(device: torch.device) -> Tensor:
    return torch.tensor(CODE_BOOK, dtype=torch.float32, device=device)


@cache
def _borders(kind: str) -> Tensor:
    """Midpoints of the code book's values, fp32 [15] on the CPU, as a ``kind`` of device has them.

    Four of them lie half-way between two fp32 numbers, and of those bitsandbytes' CUDA code has
    the other one than PyTorch's arithmetic, which its CPU code has.
    """
    book = _code_book(torch.device("cpu"))
    borders = (book[:-1] + book[1:]) / 2
    if kind == "cuda":
        for index, value in _CUDA_BORDERS.items():
            borders[index] = value
    return borders


@cache
def _pairs(device: torch.device) -> Tensor:
    """[256, 2]: the two values of each byte, so that one lookup gives both."""
    book = _code_book(device)
    return torch.stack([book.repeat_interleave(16), book.repeat(16)], dim=1)


@cache
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of the 65,536 upper halves of an fp32's bits: code of its lowest value, its border.

    The floats that share sign, exponent and seven bits of mantissa lie within 1/128 of one
    another, so at most one border between codes falls among them; infinity where none does.
    """
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
    borders = _borders(device.type)
    low, high = torch.bucketize(torch.stack([ends.amin(dim=0), ends.amax(dim=0)]), borders)
    assert int((high - low).max()) <= 1
    border = torch.where(high > low, borders[low.clamp(max=14)], torch.inf)
    return low.to(torch.uint8).to(device), border.to(device)


def _nearest_code(scaled: Tensor) -> Tensor:
    """Codes uint8 of fp32 values in [-1, 1]: how many borders lie below each.

    Two lookups by the value's upper bits and one comparison: 6 ns a value on one AVX2 core, where
    a binary search (torch.bucketize) takes 25.
    """
    lowest, border = _cells(scaled.device)
    cell = (scaled.view(torch.int32) >> 16).add_(1 << 15)
    above = scaled > border.index_select(0, cell)
    return lowest.index_select(0, cell).add_(above.view(torch.uint8))


def _quick_inverse(x: Tensor) -> Tensor:
    """1 / x of positive fp32 ``x`` on a GPU as bitsandbytes has it there.

    It is compiled with fast mathematics: the inverse may be one unit in the last place off, which
    gives a few of a million fp32 weights the code beside. Without Triton it is exact.
    """
    if not INSTALLED:
        return 1.0 / x
    out = torch.empty_like(x)
    block = 1024
    _approximate_inverse[(triton.cdiv(x.numel(), block),)](x, out, x.numel(), BLOCK=block)
    return out


@triton.jit
def _approximate_inverse(x, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=1.0)
    inverse = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(out + at, inverse, mask=at < n)


def code_count(n: int) -> int:
    """Bytes of the codes of ``n`` weights."""
    return (n + 1) // 2


def block_count(n: int, block_size: int) -> int:
    """Blocks of ``n`` weights, each with a scale."""
    return -(-n // block_size)


def quantize_blocks(
    weight: Tensor, block_size: int, codes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``weight`` (fp32, bf16 or fp16, any shape) → codes uint8 [⌈n/2⌉], absmax fp32 [⌈n/block⌉].

    ``block_size`` is even; the last block may be shorter. ``codes`` is where they are put, by
    default in memory of their own.
    """
    flat = weight.reshape(-1)
    n = flat.numel()
    on_gpu = flat.device.type == "cuda"
    if codes is None:
        codes = torch.empty(code_count(n), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(block_count(n, block_size), dtype=torch.float32, device=flat.device)
    step = _CHUNK // block_size * block_size
    for start in range(0, n, step):
        chunk = flat[start : start + step].float()
        whole = chunk.numel() // block_size * block_size
        parts = []
        if whole:
            blocks = chunk[:whole].view(-1, block_size)
            scale = blocks.abs().amax(dim=1)
            first = start // block_size
            absmax[first : first + len(scale)] = scale
            # 1e-38 keeps a block of zeros from dividing by zero; the scale stored is the 0. On a
            # GPU bitsandbytes lets it be, and 0 · ∞ is above no border.
            inverse = _quick_inverse(scale) if on_gpu else 1.0 / scale.clamp(min=1e-38)
            parts.append((blocks * inverse[:, None]).clamp_(-1, 1).view(-1))
        if whole < chunk.numel():
            rest = chunk[whole:]
            scale = rest.abs().amax()
            if not on_gpu:
                scale = scale.clamp(min=1e-38)
            absmax[-1] = scale
            quotient = rest * _quick_inverse(scale.view(1)) if on_gpu else rest / scale
            parts.append(quotient.clamp_(-1, 1))
        scaled = parts[0] if len(parts) == 1 else torch.cat(parts)
        if on_gpu:
            scaled.nan_to_num_(nan=-1.0)
        if scaled.numel() % 2:
            scaled = torch.nn.functional.pad(scaled, (0, 1))
        index = _nearest_code(scaled)
        codes[start // 2 : start // 2 + index.numel() // 2] = (index[::2] << 4) | index[1::2]
    return codes, absmax


def dequantize_blocks(
    codes: Tensor, absmax: Tensor, block_size: int, n: int, dtype: torch.dtype
) -> Tensor:
    """codes uint8 [⌈n/2⌉], absmax fp32 [⌈n/block⌉] → [n] in ``dtype``."""
    out = torch.empty(n, dtype=dtype, device=codes.device)
    pairs = _pairs(codes.device)
    step = _CHUNK // block_size * block_size
    for start in range(0, n, step):
        size = min(step, n - start)
        index = codes[start // 2 : start // 2 + (size + 1) // 2].int()
        values = pairs.index_select(0, index).view(-1)[:size]
        whole = size // block_size * block_size
        first = start // block_size
        scales = absmax[first : first + whole // block_size]
        values[:whole].view(-1, block_size).mul_(scales[:, None])
        if whole < size:
            values[whole:].mul_(absmax[-1])
        out[start : start + size] = values
    return out


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    return dynamic_map(signed=True).to(device)


@cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of the 8-bit dynamic data type, ascending, fp32 [256].

    Dettmers, 2015 (arXiv 1511.04561): the number of leading zeros is a decimal exponent, what
    follows it a linear fraction, so that values over seven orders of magnitude are told apart.
    Unsigned, the sign's bit gives twice as many fractions.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        borders = torch.linspace(0.1, 1, count + 1)
        means = (borders[:-1] + borders[1:]) / 2.0
        scaled = (10 ** (exponent - 6) * means).tolist()
        values += scaled + ([-v for v in scaled] if signed else [])
    values += [0.0] * (256 - len(values))
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax fp32 [b] → codes uint8 [b], their scales fp32 [⌈b/256⌉], offset fp32 scalar.

    The mean is subtracted first, which makes positive scales symmetric about 0. Its rounding
    depends on the device, so codes can differ between a CPU and a GPU.
    """
    offset = absmax.mean()
    centred = absmax - offset
    book = _dynamic_map(absmax.device)
    blocks = -(-centred.numel() // SCALES_PER_BLOCK)
    padded = torch.nn.functional.pad(centred, (0, blocks * SCALES_PER_BLOCK - centred.numel()))
    grouped = padded.view(blocks, SCALES_PER_BLOCK)
    nested = grouped.abs().amax(dim=1)
    # Its reciprocal, as bitsandbytes has it: a quotient gives another code two times in a million.
    # A block of zeros gives 0 · ∞, which bitsandbytes makes code 0.
    scaled = (grouped * (1.0 / nested)[:, None]).nan_to_num_(nan=-1.0).view(-1)
    if absmax.device.type == "cpu":
        # There bitsandbytes looks codes up in a table over a grid of 65,536 values on [-1, 1]
        # (a GPU searches the code itself), so 0.2 % of the codes are the nearest one's neighbour.
        scaled = ((scaled + 1.0) * 32767.5 + 0.5).floor_() * 2.0 / 65535.0 - 1.0
    codes = torch.bucketize(scaled, (book[:-1] + book[1:]) / 2, out_int32=True)
    return codes[: absmax.numel()].to(torch.uint8), nested, offset


def dequantize_scales(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """What :func:`quantize_scales` gave → absmax fp32 [b]."""
    values = _dynamic_map(codes.device).index_select(0, codes.int())
    return values * nested.repeat_interleave(SCALES_PER_BLOCK)[: len(values)] + offset
