"""AdamW in one pass over the flat parameters, with moments in 8 bits or in fp32.

    m ← β₁ m + (1 - β₁) g          v ← β₂ v + (1 - β₂) g²              g = clip_scale · grad
    p ← decay · p + (step_size · m) / (√v / root + ε)

with step_size = -lr / (1 - β₁ᵗ), root = √(1 - β₂ᵗ) and decay = 1 - lr·λ, which a kernel of one
program makes on the device, in fp64 (:func:`adamw_scalars_`). The references are the PyTorch code
of :mod:`halfbyte.optim.adamw` and :mod:`halfbyte.optim.adamw_8bit`: the same operations in the same
order, each rounded (products and sums are not contracted), quotients and roots IEEE's.

What bounds it: 16 bytes an element with 8-bit moments (p and both codes read and written, g read)
and 28 with fp32 ones, so 24 and 42 µs for 4.5 million elements at 3 TB/s. A binary search for the
code among 255 borders would be eight dependent loads for each of the two moments and take longer:
the map is linear within a decade, so that a product and a sum give the code or the one below it,
and one comparison with the exact border between them decides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbyte.kernels.triton_shim import tl, triton

BLOCK = 256  # elements that share a scale

# One warp holds whole blocks, eight elements of each a lane, so that finding the largest magnitude
# needs no barrier.
_BLOCKS_8BIT, _WARPS_8BIT = 2, 1
_SIZE_32BIT, _WARPS_32BIT = 1024, 4


def search_table(book: Tensor) -> Tensor:
    """``book`` fp32 [256], a dynamic map → fp32 [2, 256]: its values, the borders above them.

    A value is nearest to code c where it is above border c - 1 and not above border c.
    """
    top = torch.full((1,), torch.inf, device=book.device)
    return torch.stack([book, torch.cat([(book[:-1] + book[1:]) / 2, top])])


@triton.jit
def _quotient(x, y, inverse):  # type: ignore[no-untyped-def]
    """x / y rounded to nearest, where ``inverse`` is 1 / y rounded to nearest.

    For a y that many x share: three instructions instead of fifteen (Markstein, 1990, theorem 8).
    """
    q = x * inverse
    return tl.fma(tl.fma(-q, y, x), inverse, q)


@triton.jit
def _nearest_code(values, scale, table, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes int32 of ``values`` [blocks, 256] / ``scale`` [blocks], its block's largest magnitude.

    Decade k = 0 … 6 of the map, from 10^(k-7) to 10^(k-6), has n = 2^k magnitudes (unsigned
    2^(k+1)) in the middles of n equal parts, and a lies t = n (a · 10^(6-k) - 0.1) / 0.9 parts into
    it. Borders are at whole t, but the decade's first is up to 0.2 above and the one below 1.0 is
    0.25 below. So ⌊t - 0.25⌋ is the part looked for or the one under it, with room for rounding.
    Counted over all decades t is concave in a, hence the least of the decades' straight lines.
    """
    # A power of two keeps the inverse of a small scale finite, and what is left over exact.
    power = tl.where(scale < 2.0**-60, 2.0**80, 1.0)
    scale *= power
    inverse = tl.where(scale > 0.0, tl.div_rn(1.0, scale), 0.0)  # a block of zeros stays one
    scaled = _quotient(values * power[:, None], scale[:, None], inverse[:, None])
    a = tl.abs(scaled)
    n0: tl.constexpr = 1.0 if SIGNED else 2.0
    rank = tl.fma(a, n0 * 1e6 / 0.9, n0 * 8.0 / 9.0 - 0.25)
    for k in tl.static_range(1, 7):
        line = tl.fma(a, n0 * 1e6 * 0.2**k / 0.9, n0 * 2.0**k * 8.0 / 9.0 - 0.25)
        rank = tl.minimum(rank, line)
    # Never below 0.6, so the conversion, which rounds towards 0, is the floor.
    rank = rank.to(tl.int32)
    # Code 127 of the signed map is 0; under it the lower candidate is the larger magnitude.
    code = tl.where(scaled < 0.0, 126 - rank, 127 + rank) if SIGNED else rank - 1
    code = tl.minimum(tl.maximum(code, 0), 254)
    return code + (scaled > tl.load(table + 256 + code)).to(tl.int32)


@triton.jit
def _updated(p, m, v, scalars, eps):  # type: ignore[no-untyped-def]
    """The new parameter, of the moments that are new already."""
    step_size = tl.load(scalars + 1)
    root = tl.load(scalars + 2)
    decay = tl.load(scalars + 3)
    denominator = _quotient(tl.sqrt_rn(v), root, tl.div_rn(1.0, root)) + eps
    return tl.div_rn(m * step_size, denominator) + p * decay


@triton.jit(do_not_specialize=["blocks"])
def _adamw_8bit(  # type: ignore[no-untyped-def]
    data,
    grad,
    codes_m,
    absmax_m,
    codes_v,
    absmax_v,
    shadow,
    scalars,
    do_update,
    table_m,
    table_v,
    blocks,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    if tl.load(do_update) == 0:
        return
    row = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (row < blocks)[:, None]
    # Four neighbours a lane, of fp32 and of bytes alike: wider loads of the bytes alone would have
    # everything change lanes on the way, through shared memory.
    column = tl.max_contiguous(tl.arange(0, BLOCK), 4)
    at = row.to(tl.int64)[:, None] * BLOCK + column[None, :]

    g = tl.load(grad + at, mask=inside, other=0.0) * tl.load(scalars)
    p = tl.load(data + at, mask=inside, other=0.0)
    m = tl.load(table_m + tl.load(codes_m + at, mask=inside, other=0).to(tl.int32))
    v = tl.load(table_v + tl.load(codes_v + at, mask=inside, other=0).to(tl.int32))
    m *= tl.load(absmax_m + row, mask=row < blocks, other=0.0)[:, None]
    v *= tl.load(absmax_v + row, mask=row < blocks, other=0.0)[:, None]

    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    p = _updated(p, m, v, scalars, eps)
    tl.store(data + at, p, mask=inside)
    if shadow is not None:
        tl.store(shadow + at, p.to(shadow.dtype.element_ty), mask=inside)

    scale_m = tl.max(tl.abs(m), axis=1)
    scale_v = tl.max(v, axis=1)
    tl.store(absmax_m + row, scale_m, mask=row < blocks)
    tl.store(absmax_v + row, scale_v, mask=row < blocks)
    code = _nearest_code(m, scale_m, table_m, True)
    code -= ((code == 127) & (m < 0.0)).to(tl.int32)  # a sign is kept, as in bitsandbytes
    tl.store(codes_m + at, code.to(tl.uint8), mask=inside)
    code = _nearest_code(v, scale_v, table_v, False)
    tl.store(codes_v + at, code.to(tl.uint8), mask=inside)


@triton.jit
def _adamw_32bit(  # type: ignore[no-untyped-def]
    data,
    grad,
    m_state,
    v_state,
    shadow,
    scalars,
    do_update,
    n,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    SIZE: tl.constexpr,
):
    if tl.load(do_update) == 0:
        return
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < n
    g = tl.load(grad + at, mask=inside, other=0.0) * tl.load(scalars)
    p = tl.load(data + at, mask=inside, other=0.0)
    m = tl.load(m_state + at, mask=inside, other=0.0) * beta1 + g * rest1
    v = tl.load(v_state + at, mask=inside, other=0.0) * beta2 + g * g * rest2
    p = _updated(p, m, v, scalars, eps)
    tl.store(data + at, p, mask=inside)
    tl.store(m_state + at, m, mask=inside)
    tl.store(v_state + at, v, mask=inside)
    if shadow is not None:
        tl.store(shadow + at, p.to(shadow.dtype.element_ty), mask=inside)


@triton.jit
def _adamw_scalars(  # type: ignore[no-untyped-def]
    count,
    lr,
    clip_scale,
    do_update,
    scalars,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
):
    number = tl.load(count) + tl.load(do_update).to(tl.int64)
    tl.store(count, number)
    # A sound exponent for the step that is thrown away at count 0.
    t = tl.maximum(number, 1).to(tl.float64)
    rate = tl.load(lr).to(tl.float64)
    root = tl.sqrt(1.0 - tl.exp(t * LOG_BETA2))
    tl.store(scalars, tl.load(clip_scale))
    tl.store(scalars + 1, (-rate / (1.0 - tl.exp(t * LOG_BETA1))).to(tl.float32))
    tl.store(scalars + 2, root.to(tl.float32))
    tl.store(scalars + 3, (1.0 - rate * WEIGHT_DECAY).to(tl.float32))


def adamw_scalars_(
    count: Tensor,
    lr: Tensor,
    clip_scale: Tensor,
    do_update: Tensor,
    scalars: Tensor,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """``count`` += ``do_update``, and ``scalars`` fp32 [4] for the kernels below.

    ``count`` int64, ``lr`` and ``clip_scale`` fp32 and ``do_update`` bool are scalars on the
    device. ``scalars`` becomes clip_scale, step_size, root, decay.
    """
    _adamw_scalars[(1,)](
        count,
        lr,
        clip_scale,
        do_update,
        scalars,
        LOG_BETA1=_log(beta1),
        LOG_BETA2=_log(beta2),
        WEIGHT_DECAY=weight_decay,
        num_warps=1,  # of several, one might read the count when another had written it
        enable_fp_fusion=False,
    )


def _log(beta: float) -> float:
    """ln β; of β = 0 a number whose exponential is 0."""
    return math.log(beta) if beta > 0.0 else -1e4


def adamw_8bit_(
    data: Tensor,
    grad: Tensor,
    codes_m: Tensor,
    absmax_m: Tensor,
    codes_v: Tensor,
    absmax_v: Tensor,
    scalars: Tensor,
    do_update: Tensor,
    table_m: Tensor,
    table_v: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    shadow: Tensor | None = None,
) -> None:
    """One update of ``data`` fp32 [n] and its moments from ``grad`` fp32 [n], n a multiple of 256.

    ``codes`` uint8 [n] and ``absmax`` fp32 [n / 256] are the moments, ``scalars`` what
    :func:`adamw_scalars_` makes, ``table`` the :func:`search_table` of the signed map for m and of
    the unsigned one for v. ``shadow`` [n], of any floating type, receives the new parameters
    rounded once. Where ``do_update`` (bool, on the device) is false nothing is written, the shadow
    included: whoever sets it fills it first.
    """
    blocks = data.numel() // BLOCK
    _adamw_8bit[(triton.cdiv(blocks, _BLOCKS_8BIT),)](
        data,
        grad,
        codes_m,
        absmax_m,
        codes_v,
        absmax_v,
        shadow,
        scalars,
        do_update,
        table_m,
        table_v,
        blocks,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
        BLOCK=BLOCK,
        BLOCKS=_BLOCKS_8BIT,
        num_warps=_WARPS_8BIT,
        enable_fp_fusion=False,
    )


def adamw_32bit_(
    data: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    scalars: Tensor,
    do_update: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    shadow: Tensor | None = None,
) -> None:
    """One update of ``data`` fp32 [n] with moments ``m`` and ``v`` fp32 [n]; n may be anything.

    The other arguments are those of :func:`adamw_8bit_`.
    """
    n = data.numel()
    _adamw_32bit[(triton.cdiv(n, _SIZE_32BIT),)](
        data,
        grad,
        m,
        v,
        shadow,
        scalars,
        do_update,
        n,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
        SIZE=_SIZE_32BIT,
        num_warps=_WARPS_32BIT,
        enable_fp_fusion=False,
    )
