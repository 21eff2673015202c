"""The product of a linear layer with DoRA, forward and backward.

    y = x Wᵀ + b + (m - 1) ⊙ z Wᵀ + m ⊙ s (z Aᵀ) Bᵀ,    z = drop(x),    m = magnitude / ‖W + s B A‖

(Liu et al., 2024, arXiv 2402.09353), with the norm of each row of W + s B A, which counts as a
constant in the backward pass (section 4.3 there). Without dropout that is m ⊙ x (W + s B A)ᵀ + b;
with it the base's own product is of the whole x, as PEFT has it. With v = z Wᵀ + s (z Aᵀ) Bᵀ,
dv = m ⊙ dL/dy and g = s · dv · B:

    y = (x - z) Wᵀ + m ⊙ v + b
    dL/dz = (dv - dL/dy) W + g A      dL/dx = dL/dy · W + drop'(dL/dz)
    dA = gᵀ z      dB = s dvᵀ (z Aᵀ)      dL/dmagnitude = Σ_t (dL/dy ⊙ v) / ‖W + s B A‖

The norms need no W + s B A: of row o the square is ‖W_o‖² + 2 s W_o · (B A)_o + s² ‖(B A)_o‖². As
m is near to 1, m ⊙ v is made as v + (m - 1) ⊙ v: bf16 has one number in 128 there, and m rounded
to it would be off by more than a short training moves it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.dropout import keep_mask
from halfbyte.kernels.lora_linear import ApplyDropout, Key, drop


def row_squares(weight: Tensor) -> Tensor:
    """‖W_o‖² of each row of ``weight`` [out, in], fp32 [out]."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()


def adapted_norms(
    weight: Tensor, squares: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float
) -> Tensor:
    """‖W_o + s (B A)_o‖ of each row, fp32 [out]; ``squares`` are the :func:`row_squares` of W."""
    a, b = lora_A.float(), lora_B.float()
    across = (weight @ lora_A.to(weight.dtype).t()).float()
    found = squares + 2.0 * scale * (across * b).sum(1)
    return found.add_((b @ (a @ a.t()) * b).sum(1), alpha=scale**2).clamp_(min=0.0).sqrt_()


class DoraLinear(torch.autograd.Function):
    """The adapted product; :func:`dora_linear` names its arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        weight: Callable[[], Tensor],
        squares: Tensor,
        bias: Tensor | None,
        scale: float,
        p: float,
        key: Key | None,
        apply: ApplyDropout | None,
        dtype: torch.dtype,
    ) -> Tensor:
        w, xc = weight(), x.to(dtype)
        norms = adapted_norms(w, squares, lora_A, lora_B, scale)
        z = _dropped(xc, p, key, apply)
        u = z @ lora_A.to(dtype).t()
        v = (z @ w.t()).addmm_(u, lora_B.to(dtype).t(), alpha=scale)
        y = torch.addcmul(v, v, _excess(magnitude, norms, dtype))
        if key is not None:
            y.addmm_(xc - z, w.t())
        if bias is not None:
            y += bias
        ctx.save_for_backward(x, u, v, lora_A, lora_B, magnitude, norms)
        ctx.weight, ctx.scale, ctx.dtype = weight, scale, dtype
        ctx.p, ctx.key, ctx.drop = p, key, apply
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, u, v, lora_A, lora_B, magnitude, norms = ctx.saved_tensors
        dtype, p, key, apply = ctx.dtype, ctx.p, ctx.key, ctx.drop
        dy, a, b = grads[0].to(dtype), lora_A.to(dtype), lora_B.to(dtype)
        d_magnitude = (dy * v).sum(0, dtype=torch.float32) / norms
        excess = _excess(magnitude, norms, dtype)
        dv = torch.addcmul(dy, dy, excess)
        g = (dv @ b) * ctx.scale
        z = _dropped(x.to(dtype), p, key, apply)
        d_a = (g.t() @ z).to(lora_A.dtype)
        d_b = ((dv.t() @ u) * ctx.scale).to(lora_B.dtype)
        d_x = None
        if ctx.needs_input_grad[0]:
            w = ctx.weight()
            if key is None:
                d_x = (dv @ w).addmm_(g, a)
            else:
                d_z = ((dy * excess) @ w).addmm_(g, a)
                d_x = dy @ w
                if apply is None:
                    mask = keep_mask(tuple(x.shape), p, key, x.device, dtype)
                    d_x.addcmul_(d_z, mask, value=1.0 / (1.0 - p))
                else:
                    apply(d_z, key, p, d_x, accumulate=True)
            d_x = d_x.to(x.dtype)
        return d_x, d_a, d_b, d_magnitude.to(magnitude.dtype), *(None,) * 8


def _excess(magnitude: Tensor, norms: Tensor, dtype: torch.dtype) -> Tensor:
    """m - 1 [out]."""
    return (magnitude / norms - 1.0).to(dtype)


def _dropped(x: Tensor, p: float, key: Key | None, apply: ApplyDropout | None) -> Tensor:
    """``x`` with what is kept scaled by 1 / (1 - p)."""
    dropped = drop(x, p, key, apply)
    return dropped if key is None or apply is not None else dropped * (1.0 / (1.0 - p))


def dora_linear(
    x: Tensor,
    weight: Callable[[], Tensor],
    squares: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scale: float,
    dropout_p: float,
    key: Key | None,
    dtype: torch.dtype,
    apply: ApplyDropout | None = None,
) -> Tensor:
    """The layer's output [T, out] in ``dtype`` for ``x`` [T, in] of any floating type.

    ``magnitude`` fp32 [out] is trained as A and B are, ``squares`` fp32 [out] the
    :func:`row_squares` of W. All else is as :func:`~halfbyte.kernels.lora_linear.lora_linear` has
    it. Kept for the backward pass are x, z Aᵀ [T, r] and v [T, out].
    """
    return DoraLinear.apply(  # type: ignore[no-untyped-call]
        x,
        lora_A,
        lora_B,
        magnitude,
        weight,
        squares,
        bias,
        scale,
        dropout_p,
        key,
        apply,
        dtype,
    )
