"""The gated activation of a feed-forward block: SwiGLU and GeGLU (Shazeer, 2020).

    out = act(gate) · up         d_up = d · act(gate)         d_gate = d · up · act'(gate)

All three activations are g times a share σ of it between 0 and 1:

    silu         σ = sigmoid(g)                      act' = σ + g · σ · (1 - σ)
    gelu         σ = (1 + erf(g / √2)) / 2           act' = σ + g · exp(-g² / 2) / √(2π)
    gelu_tanh    σ = sigmoid(z), z = 2 √(2 / π) · (g + 0.044715 g³)
                                                     act' = σ + g · σ · (1 - σ) · z'

The last is the usual form with a tanh, of which (1 + tanh u) / 2 = sigmoid(2u). In transformers
act(gate) is rounded to 16 bits before it meets up; here the product is rounded once.

Bound by memory: each value is read once and each result written once, 8 a thread. The backward
pass can write over the gate and the up that it reads, and give out again, so that a layer keeps
[gate, up] alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from halfbyte.kernels.triton_shim import tl, triton

Activation = Literal["silu", "gelu", "gelu_tanh"]

_BLOCK = 1024  # columns of a row in one program of four warps


def _act(gate: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(gate, approximate=approximate)


def gated_reference(gate_up: Tensor, out: Tensor, activation: Activation) -> None:
    """What :func:`gated` does, in plain PyTorch."""
    gate, up = gate_up.float().chunk(2, dim=1)
    out.copy_(_act(gate, activation) * up)


def gated_backward_reference(
    d_act: Tensor,
    gate_up: Tensor,
    d_gate_up: Tensor,
    activation: Activation,
    act: Tensor | None = None,
) -> None:
    """What :func:`gated_backward` does, in plain PyTorch."""
    # Copies, even of fp32: what is written may be what was read.
    gate, up = gate_up.detach().to(torch.float32, copy=True).chunk(2, dim=1)
    d = d_act.to(torch.float32, copy=True)
    with torch.enable_grad():
        leaf = gate.contiguous().requires_grad_()
        value = _act(leaf, activation)
    (slope,) = torch.autograd.grad(value, leaf, torch.ones_like(leaf))
    value = value.detach()
    d_gate_up.copy_(torch.cat([d * up * slope, d * value], dim=1))
    if act is not None:
        act.copy_(value * up)


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(g) and act'(g)."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        slope = share + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        if ACTIVATION == "silu":
            z = g
            dz = 1.0
        else:
            z = g * (1.5957691216057308 + 0.07135481627260025 * g * g)
            dz = 1.5957691216057308 + 0.21406444881780076 * g * g
        share = tl.sigmoid(z)
        slope = share + g * share * (1.0 - share) * dz
    return g * share, slope


@triton.jit
def _gated(  # type: ignore[no-untyped-def]
    gate_up,
    out,
    gate_up_stride,
    out_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate_up += tl.multiple_of(row * gate_up_stride, ALIGNED)
    out += tl.multiple_of(row * out_stride, ALIGNED)
    gate = tl.load(gate_up + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(gate, ACTIVATION)
    tl.store(out + column, (value * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(  # type: ignore[no-untyped-def]
    d_act,
    gate_up,
    d_gate_up,
    act,
    d_act_stride,
    gate_up_stride,
    d_gate_up_stride,
    act_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    d_act += tl.multiple_of(row * d_act_stride, ALIGNED)
    gate_up += tl.multiple_of(row * gate_up_stride, ALIGNED)
    d_gate_up += tl.multiple_of(row * d_gate_up_stride, ALIGNED)
    d = tl.load(d_act + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(gate, ACTIVATION)
    c = d_gate_up.dtype.element_ty
    tl.store(d_gate_up + column, (d * up * slope).to(c), mask=inside)
    tl.store(d_gate_up + WIDTH + column, (d * value).to(c), mask=inside)
    if act is not None:
        act += tl.multiple_of(row * act_stride, ALIGNED)
        tl.store(act + column, (value * up).to(act.dtype.element_ty), mask=inside)


def _shape(width: int, *strides: int) -> dict[str, int]:
    """Compile-time sizes of a launch: every stride a multiple of 8 allows 16-byte accesses."""
    block = min(max(triton.next_power_of_2(width), 64), _BLOCK)
    aligned = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return {"WIDTH": width, "BLOCK": block, "ALIGNED": aligned, "num_warps": max(block // 256, 1)}


def gated(gate_up: Tensor, out: Tensor, activation: Activation) -> None:
    """``out`` [T, I] = act(gate) · up, with ``gate_up`` [T, 2I] holding the gate and then the up.

    Both may have any row stride.
    """
    tokens, width = out.shape
    assert gate_up.shape == (tokens, 2 * width)
    assert gate_up.stride(1) == out.stride(1) == 1
    shape = _shape(width, gate_up.stride(0), out.stride(0))
    _gated[(tokens * triton.cdiv(width, shape["BLOCK"]),)](
        gate_up, out, gate_up.stride(0), out.stride(0), ACTIVATION=activation, **shape
    )


def gated_backward(
    d_act: Tensor,
    gate_up: Tensor,
    d_gate_up: Tensor,
    activation: Activation,
    act: Tensor | None = None,
) -> None:
    """``d_gate_up`` [T, 2I], which may be ``gate_up`` itself, from ``d_act`` [T, I] = dL/dout.

    ``act`` [T, I], if given, receives out again; it may be ``d_act``. All may have any row stride.
    """
    tokens, width = d_act.shape
    assert gate_up.shape == d_gate_up.shape == (tokens, 2 * width)
    assert d_act.stride(1) == gate_up.stride(1) == d_gate_up.stride(1) == 1
    if act is not None:
        assert act.shape == d_act.shape
        assert act.stride(1) == 1
    strides = (
        d_act.stride(0),
        gate_up.stride(0),
        d_gate_up.stride(0),
        0 if act is None else act.stride(0),
    )
    shape = _shape(width, *strides)
    _gated_backward[(tokens * triton.cdiv(width, shape["BLOCK"]),)](
        d_act, gate_up, d_gate_up, act, *strides, ACTIVATION=activation, **shape
    )
