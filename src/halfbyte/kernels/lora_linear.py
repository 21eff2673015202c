"""The product of a QLoRA linear layer, forward and backward, keeping nothing it can make again.

    y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ          (Hu et al., 2021, arXiv 2106.09685, eq. 3)

With u = drop(x) Aᵀ and g = s · dL/dy · B, where drop scales what it keeps by 1 / (1 - p):

    dL/dx = dL/dy · W + drop'(g A)      dL/dA = gᵀ drop(x)      dL/dB = s · (dL/dy)ᵀ u

W is frozen and has no gradient. Saved for the backward pass are ``x`` as it came in (which q, k
and v share, so it is kept once) and ``u`` [T, r]; W is asked for again, which is free where a
copy is kept and a dequantization where it is not, and the dropout mask is made again from its key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.dropout import keep_mask

Key = tuple[int, int] | Tensor
# (x, key, p, out, *, accumulate): see halfbyte.kernels.dropout.apply_dropout.
ApplyDropout = Callable[..., None]


class LoraLinear(torch.autograd.Function):
    """The adapted product; :func:`lora_linear` names its arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        scale: float,
        p: float,
        key: Key | None,
        apply: ApplyDropout | None,
        dtype: torch.dtype,
    ) -> Tensor:
        xc = x.to(dtype)
        y = torch.nn.functional.linear(xc, weight(), bias)
        if key is not None and apply is None:
            # What is kept is scaled by 1 / (1 - p); that is one number with s.
            scale = scale / (1.0 - p)
        u = drop(xc, p, key, apply) @ lora_A.to(dtype).t()
        y.addmm_(u, lora_B.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(x, u, lora_A, lora_B)
        ctx.weight, ctx.scale, ctx.dtype = weight, scale, dtype
        ctx.p, ctx.key, ctx.drop = p, key, apply
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, u, lora_A, lora_B = ctx.saved_tensors
        dtype, key, apply = ctx.dtype, ctx.key, ctx.drop
        dy = grads[0].to(dtype)
        a, b = lora_A.to(dtype), lora_B.to(dtype)
        g = (dy @ b) * ctx.scale
        xc = x.to(dtype)
        mask = None
        if key is not None and apply is None:
            mask = keep_mask(tuple(xc.shape), ctx.p, key, xc.device, dtype)
        dropped = drop(xc, ctx.p, key, apply) if mask is None else xc * mask
        d_a = (g.t() @ dropped).to(lora_A.dtype)
        d_b = ((dy.t() @ u) * ctx.scale).to(lora_B.dtype)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = dy @ ctx.weight()
            if mask is not None:
                d_x.addcmul_(g @ a, mask)
            elif apply is not None and key is not None:
                apply(g @ a, key, ctx.p, d_x, accumulate=True)
            else:
                d_x.addmm_(g, a)
            d_x = d_x.to(x.dtype)
        return d_x, d_a, d_b, *(None,) * 7


def drop(x: Tensor, p: float, key: Key | None, apply: ApplyDropout | None) -> Tensor:
    """``x`` dropped, and what is kept scaled by 1 / (1 - p) only where ``apply`` does it."""
    if key is None:
        return x
    if apply is None:
        return x * keep_mask(tuple(x.shape), p, key, x.device, x.dtype)
    dropped = torch.empty_like(x)
    apply(x, key, p, dropped)
    return dropped


class FrozenLinear(torch.autograd.Function):
    """``x Wᵀ + b`` with a frozen W that is asked for again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.weight, ctx.dtype, ctx.input_dtype = weight, dtype, x.dtype
        return torch.nn.functional.linear(x.to(dtype), weight(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (grads[0].to(ctx.dtype) @ ctx.weight()).to(ctx.input_dtype), None, None, None


def lora_linear(
    x: Tensor,
    weight: Callable[[], Tensor],
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *,
    scale: float,
    dropout_p: float,
    key: Key | None,
    dtype: torch.dtype,
    apply: ApplyDropout | None = None,
) -> Tensor:
    """The layer's output [T, out] in ``dtype`` for ``x`` [T, in] of any floating type.

    ``weight()`` gives W [out, in] in ``dtype``; ``lora_A`` [r, in] and ``lora_B`` [out, r] are the
    adapter in fp32 (cast to ``dtype`` for the products, gradients cast back), or None for the base
    alone; ``key`` names the dropout mask, None drops nothing. With ``apply``, a kernel that takes
    keys which lie on the device and an even number of columns, no mask stands in memory.
    """
    if lora_A is None or lora_B is None:
        return FrozenLinear.apply(x, weight, bias, dtype)  # type: ignore[no-untyped-call]
    return LoraLinear.apply(x, lora_A, lora_B, weight, bias, scale, dropout_p, key, apply, dtype)  # type: ignore[no-untyped-call]
