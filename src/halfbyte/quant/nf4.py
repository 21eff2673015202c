"""A weight stored in NF4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.nf4 import (
    dequantize_blocks,
    dequantize_scales,
    quantize_blocks,
    quantize_scales,
)


@dataclass(frozen=True)
class NF4Weight:
    """A tensor of ``shape`` in NF4.

    ``codes`` uint8 [⌈n/2⌉]. With single quantization ``absmax`` is fp32 [⌈n/block_size⌉] and the
    other two are None; with double quantization it is uint8 of the same length, ``nested`` fp32
    [⌈blocks/256⌉] holds the scales of the scales and ``offset`` fp32 [] their mean.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    block_size: int
    nested: Tensor | None = None
    offset: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def scales(self) -> Tensor:
        """The scale of each block, fp32."""
        if self.nested is None or self.offset is None:
            return self.absmax
        return dequantize_scales(self.absmax, self.nested, self.offset)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [shape] in ``dtype``."""
        n = 1
        for size in self.shape:
            n *= size
        flat = dequantize_blocks(self.codes, self.scales(), self.block_size, n, dtype)
        return flat.view(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        found = {"codes": self.codes, "absmax": self.absmax}
        if self.nested is not None and self.offset is not None:
            found |= {"nested": self.nested, "offset": self.offset}
        return found

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same weight on ``device``."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return NF4Weight(shape=self.shape, block_size=self.block_size, **moved)


def quantize_nf4(weight: Tensor, *, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """``weight`` (fp32, bf16 or fp16) in NF4 on its own device."""
    codes, absmax = quantize_blocks(weight, block_size)
    shape = tuple(weight.shape)
    if not double_quant:
        return NF4Weight(codes, absmax, shape, block_size)
    small, nested, offset = quantize_scales(absmax)
    return NF4Weight(codes, small, shape, block_size, nested, offset)
