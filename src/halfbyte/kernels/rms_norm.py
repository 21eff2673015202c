"""RMSNorm with the residual sum before it, forward and backward (Zhang and Sennrich, 2019).

    s = x + y         r = 1 / √(mean(s²) + ε)         out = w · s · r

With g = w · dL/dout and n = s · r (both [T, H]), and means over a row:

    dL/ds = r · (g - n · mean(g · n))

w is frozen and has no gradient. Gemma's norm multiplies with w + 1: ``unit_offset``. s is rounded
to the type of the residual stream before anything is made of it, so that the backward pass, which
reads the stored s, sees what the forward pass saw. In transformers' norm s · r is rounded to 16
bits before it meets w; here the product is rounded once.

What bounds the kernels is memory: forward they read x and y and write s and out, backward they
read dL/dout, s and the stream's gradient and write that and its 16-bit copy. A program owns one
row. Up to 8192 columns the row stays in registers, 16 values a thread (two 16-byte accesses a
tensor in flight), and everything is read once; wider rows are read twice, the second time mostly
from L2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.triton_shim import tl, triton

_WIDEST = 8192  # columns of a row that is kept in registers


def rms_norm_reference(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    eps: float,
    stream: Tensor | None,
    out: Tensor,
    rstd: Tensor,
    *,
    unit_offset: bool = False,
) -> None:
    """What :func:`rms_norm` does, in plain PyTorch."""
    s = x
    if y is not None:
        assert stream is not None
        s = stream.copy_(x.float() + y.float())
    s = s.float()
    rstd.copy_(torch.rsqrt(s.square().mean(dim=1) + eps))
    w = weight.float() + 1.0 if unit_offset else weight.float()
    out.copy_(w * (s * rstd[:, None]))


def rms_norm_backward_reference(
    d_out: Tensor,
    stream: Tensor,
    rstd: Tensor,
    weight: Tensor,
    d_stream: Tensor,
    d_stream_c: Tensor | None,
    *,
    first: bool = False,
    unit_offset: bool = False,
) -> None:
    """What :func:`rms_norm_backward` does, in plain PyTorch."""
    w = weight.float() + 1.0 if unit_offset else weight.float()
    g = w * d_out.float()
    n = stream.float() * rstd[:, None]
    d = rstd[:, None] * (g - n * (g * n).mean(dim=1, keepdim=True))
    if not first:
        d += d_stream.float()
    d_stream.copy_(d)
    if d_stream_c is not None:
        d_stream_c.copy_(d)


@triton.jit
def _weight(weight, columns, inside, UNIT_OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        w += 1.0
    return w


@triton.jit
def _sum(x, y, stream, columns, inside):  # type: ignore[no-untyped-def]
    """s of some columns in fp32, rounded as it is stored; stores it where there is a y."""
    s = tl.load(x + columns, mask=inside, other=0.0)
    if y is not None:
        s = s.to(tl.float32) + tl.load(y + columns, mask=inside, other=0.0).to(tl.float32)
        s = s.to(stream.dtype.element_ty)
        tl.store(stream + columns, s, mask=inside)
    return s.to(tl.float32)


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    x,
    y,
    weight,
    stream,
    out,
    rstd,
    y_stride,
    out_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * WIDTH
    if y is not None:
        stream += row * WIDTH
        y += tl.multiple_of(row * y_stride, ALIGNED)
    out += tl.multiple_of(row * out_stride, ALIGNED)
    columns = tl.arange(0, BLOCK)
    if WIDTH <= BLOCK:
        inside = columns < WIDTH
        # Asked for here, the weight is on its way while the threads wait for each other's sums.
        w = _weight(weight, columns, inside, UNIT_OFFSET)
        s = _sum(x, y, stream, columns, inside)
        r = tl.rsqrt(tl.sum(s * s, axis=0) / WIDTH + eps)
        tl.store(out + columns, (w * (s * r)).to(out.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            s = _sum(x, y, stream, start + columns, start + columns < WIDTH)
            squares += s * s
        r = tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + eps)
        if y is not None:
            tl.debug_barrier()  # a thread may read again what another one has stored
            x = stream
        for start in range(0, WIDTH, BLOCK):
            inside = start + columns < WIDTH
            s = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
            w = _weight(weight, start + columns, inside, UNIT_OFFSET)
            tl.store(out + start + columns, (w * (s * r)).to(out.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r)


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    d_out,
    stream,
    weight,
    r,
    columns,
    inside,
    UNIT_OFFSET: tl.constexpr,
):
    """g and n of some columns."""
    w = _weight(weight, columns, inside, UNIT_OFFSET)
    g = w * tl.load(d_out + columns, mask=inside, other=0.0).to(tl.float32)
    return g, r * tl.load(stream + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_gradient(d, d_stream, d_stream_c, columns, inside):  # type: ignore[no-untyped-def]
    tl.store(d_stream + columns, d.to(d_stream.dtype.element_ty), mask=inside)
    if d_stream_c is not None:
        tl.store(d_stream_c + columns, d.to(d_stream_c.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(  # type: ignore[no-untyped-def]
    d_out,
    stream,
    rstd,
    weight,
    d_stream,
    d_stream_c,
    d_out_stride,
    d_stream_c_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIRST: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d_out += tl.multiple_of(row * d_out_stride, ALIGNED)
    stream += row * WIDTH
    d_stream += row * WIDTH
    if d_stream_c is not None:
        d_stream_c += tl.multiple_of(row * d_stream_c_stride, ALIGNED)
    r = tl.load(rstd + row)
    columns = tl.arange(0, BLOCK)
    if WIDTH <= BLOCK:
        inside = columns < WIDTH
        g, n = _products(d_out, stream, weight, r, columns, inside, UNIT_OFFSET)
        if FIRST:
            before = tl.zeros((BLOCK,), tl.float32)
        else:  # read before the threads meet, as the weight above
            before = tl.load(d_stream + columns, mask=inside, other=0.0).to(tl.float32)
        d = r * (g - n * (tl.sum(g * n, axis=0) / WIDTH))
        _store_gradient(before + d, d_stream, d_stream_c, columns, inside)
    else:
        dots = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            at = start + columns
            g, n = _products(d_out, stream, weight, r, at, at < WIDTH, UNIT_OFFSET)
            dots += g * n
        mean = tl.sum(dots, axis=0) / WIDTH
        for start in range(0, WIDTH, BLOCK):
            at = start + columns
            inside = at < WIDTH
            g, n = _products(d_out, stream, weight, r, at, inside, UNIT_OFFSET)
            d = r * (g - n * mean)
            if not FIRST:
                d += tl.load(d_stream + at, mask=inside, other=0.0).to(tl.float32)
            _store_gradient(d, d_stream, d_stream_c, at, inside)


def _shape(width: int, *strides: int) -> dict[str, int]:
    """Compile-time sizes of a launch: every stride a multiple of 8 allows 16-byte accesses."""
    block = min(max(triton.next_power_of_2(width), 64), _WIDEST)
    aligned = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return {
        "WIDTH": width,
        "BLOCK": block,
        "ALIGNED": aligned,
        "num_warps": min(max(block // 512, 1), 16),
    }


def rms_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    eps: float,
    stream: Tensor | None,
    out: Tensor,
    rstd: Tensor,
    *,
    unit_offset: bool = False,
) -> None:
    """The sum and its norm, into ``stream``, ``out`` and ``rstd``.

    ``x`` [T, H] fp32 or 16 bits, contiguous, is the residual stream; ``y`` [T, H] is added to it,
    and ``stream``, of x's type and x itself if one likes, receives the sum. Without a y the norm
    is x's own and ``stream`` is left alone. ``out`` [T, H] receives the normed rows and ``rstd``
    fp32 [T] the r of each. ``y`` and ``out`` may have any row stride; ``weight`` is [H].
    """
    tokens, width = x.shape
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert rstd.is_contiguous()
    assert out.shape == x.shape
    assert out.stride(1) == 1
    if y is not None:
        assert stream is not None
        assert stream.dtype == x.dtype
        assert stream.is_contiguous()
        assert y.shape == stream.shape == x.shape
        assert y.stride(1) == 1
    y_stride = 0 if y is None else y.stride(0)
    _rms_norm[(tokens,)](
        x,
        y,
        weight,
        None if y is None else stream,
        out,
        rstd,
        y_stride,
        out.stride(0),
        eps,
        UNIT_OFFSET=unit_offset,
        **_shape(width, y_stride, out.stride(0)),
    )


def rms_norm_backward(
    d_out: Tensor,
    stream: Tensor,
    rstd: Tensor,
    weight: Tensor,
    d_stream: Tensor,
    d_stream_c: Tensor | None,
    *,
    first: bool = False,
    unit_offset: bool = False,
) -> None:
    """Add dL/ds to ``d_stream``, or with ``first`` write it there.

    ``d_out`` [T, H] is dL/dout, with any row stride; ``stream`` and ``rstd`` are what
    :func:`rms_norm` left (its x where it had no y). ``d_stream`` [T, H], contiguous, fp32 or 16
    bits, is changed in place; ``d_stream_c`` [T, H], with any row stride, or None, receives it
    rounded from fp32 to its own type: the operand of the next matrix product.
    """
    tokens, width = stream.shape
    assert stream.is_contiguous()
    assert d_stream.is_contiguous()
    assert weight.is_contiguous()
    assert rstd.is_contiguous()
    assert d_out.shape == d_stream.shape == stream.shape
    assert d_out.stride(1) == 1
    if d_stream_c is not None:
        assert d_stream_c.shape == stream.shape
        assert d_stream_c.stride(1) == 1
    c_stride = 0 if d_stream_c is None else d_stream_c.stride(0)
    _rms_norm_backward[(tokens,)](
        d_out,
        stream,
        rstd,
        weight,
        d_stream,
        d_stream_c,
        d_out.stride(0),
        c_stride,
        FIRST=first,
        UNIT_OFFSET=unit_offset,
        **_shape(width, d_out.stride(0), c_stride),
    )
