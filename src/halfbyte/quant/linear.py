"""A linear layer whose weight is 4-bit and frozen, and whose adapter learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from halfbyte.kernels.dora_linear import adapted_norms, dora_linear, row_squares
from halfbyte.kernels.dropout import dropout_key
from halfbyte.kernels.lora_linear import lora_linear

if TYPE_CHECKING:
    from halfbyte.quant.dense import DenseWeight
    from halfbyte.quant.nf4 import NF4Weight


class DropoutPosition:
    """Where training stands: with the seed and the module's number it names each dropout mask.

    One object is shared by all layers of a model. The engine sets ``step`` and ``micro_batch``, or,
    where the host must not be asked, ``keys`` int32 [modules, 2] on the device, which are made of
    them there (:func:`halfbyte.kernels.dropout.dropout_keys`) and name the same masks. ``apply`` is
    then the kernel that drops by such a key, if there is one.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self.micro_batch = 0
        self.keys: Tensor | None = None
        self.apply: Callable[..., None] | None = None

    def key(self, module: int) -> tuple[int, int] | Tensor:
        """The key of one module's mask."""
        if self.keys is not None:
            return self.keys[module]
        return dropout_key(self.seed, self.step, self.micro_batch, module)


class QLoRALinear(nn.Module):
    """``y = x · dequant(W)ᵀ + b + (lora_alpha / r) · B A drop(x)``.

    ``base`` holds W [out, in] in NF4, or as it is where a checkpoint in NF4 left it out. ``dense``
    is a copy of it in ``compute_dtype`` where memory allows one to be kept, equal bit for bit to
    what ``base`` dequantizes to. ``lora_A`` [r, in] and ``lora_B`` [out, r] are fp32 parameters,
    None before an adapter is attached. With DoRA there is ``lora_magnitude_vector`` [out] too: see
    :mod:`halfbyte.kernels.dora_linear`.
    """

    def __init__(
        self,
        base: NF4Weight | DenseWeight,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.base = base
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        self.bias: Tensor | None
        self.register_buffer("bias", bias, persistent=False)
        self.dense: Tensor | None = None
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.lora_magnitude_vector: nn.Parameter | None = None
        self.row_squares: Tensor | None = None  # with DoRA: of the rows of W, fp32 [out]
        # With PiSSA, A and B as they started: taken out of W, and there without the adapter too.
        self.initial: tuple[Tensor, Tensor] | None = None
        self.adapter_enabled = True
        self.scale = 1.0
        self.dropout_p = 0.0
        self.number = 0
        self.position: DropoutPosition | None = None

    @classmethod
    def from_weight(
        cls,
        base: NF4Weight | DenseWeight,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        compute_dtype: torch.dtype,
    ) -> QLoRALinear:
        """The layer around an already quantized weight; ``bias`` [out] in ``compute_dtype``."""
        return cls(base, bias, in_features, out_features, compute_dtype)

    def weight_dense(self) -> Tensor:
        """W [out, in] in ``compute_dtype``: the kept copy, or dequantized now."""
        if self.dense is not None:
            return self.dense
        return self.base.dequantize(self.compute_dtype)

    def keep_dense(self) -> int:
        """Dequantize once and keep it; returns the bytes that it takes."""
        self.dense = self.base.dequantize(self.compute_dtype)
        return self.dense.numel() * self.dense.element_size()

    @torch.no_grad()
    def use_dora(self) -> None:
        """Train a magnitude of each output, which starts as the norm of its adapted row of W."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        weight = self.weight_dense()
        self.row_squares = row_squares(weight)
        norms = adapted_norms(weight, self.row_squares, self.lora_A, self.lora_B, self.scale)
        self.lora_magnitude_vector = nn.Parameter(norms)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] of any floating type → [..., out] in ``compute_dtype``."""
        on = self.adapter_enabled and self.lora_A is not None
        key = apply = None
        if on and self.training and self.dropout_p > 0.0:
            at = self.position
            assert at is not None, "attach_lora gives every layer its position"
            key = at.key(self.number)
            if at.keys is not None and self.in_features % 2 == 0:
                apply = at.apply
        x2d = x.reshape(-1, self.in_features)
        if on and self.lora_magnitude_vector is not None:
            assert self.row_squares is not None
            assert self.lora_A is not None
            assert self.lora_B is not None
            y = dora_linear(
                x2d,
                self.weight_dense,
                self.row_squares,
                self.bias,
                self.lora_A,
                self.lora_B,
                self.lora_magnitude_vector,
                scale=self.scale,
                dropout_p=self.dropout_p,
                key=key,
                dtype=self.compute_dtype,
                apply=apply,
            )
            return y.view(*x.shape[:-1], self.out_features)
        a, b = (self.lora_A, self.lora_B) if on else self.initial or (None, None)
        y = lora_linear(
            x2d,
            self.weight_dense,
            self.bias,
            a,
            b,
            scale=self.scale,
            dropout_p=self.dropout_p,
            key=key,
            dtype=self.compute_dtype,
            apply=apply,
        )
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        rank = 0 if self.lora_A is None else self.lora_A.shape[0]
        return f"{self.in_features} → {self.out_features}, nf4, r={rank}"
