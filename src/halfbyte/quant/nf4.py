"""A weight stored in NF4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.nf4 import (
    block_count,
    code_count,
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


class NF4Memory:
    """Codes and scales of several weights end to end, which is how a joined product wants them.

    Weights that are joined later would leave holes between those that are not.
    """

    def __init__(
        self, sizes: Sequence[int], block_size: int, double_quant: bool, device: torch.device | str
    ) -> None:
        """For weights of so many elements each, in the order in which they are taken."""
        scale = torch.uint8 if double_quant else torch.float32
        self._codes = torch.empty(
            sum(code_count(n) for n in sizes), dtype=torch.uint8, device=device
        )
        self._absmax = torch.empty(
            sum(block_count(n, block_size) for n in sizes), dtype=scale, device=device
        )
        self._taken = [0, 0]

    def take(self, codes: int, blocks: int) -> tuple[Tensor, Tensor]:
        """The next so many codes and scales."""
        code, block = self._taken
        self._taken = [code + codes, block + blocks]
        return self._codes[code : code + codes], self._absmax[block : block + blocks]

    def place(self, weight: NF4Weight) -> NF4Weight:
        """A copy of ``weight`` here, on the memory's device."""
        codes, absmax = self.take(weight.codes.numel(), weight.absmax.numel())
        nested = None if weight.nested is None else weight.nested.to(codes.device)
        offset = None if weight.offset is None else weight.offset.to(codes.device)
        codes.copy_(weight.codes)
        absmax.copy_(weight.absmax)
        return NF4Weight(codes, absmax, weight.shape, weight.block_size, nested, offset)


def quantize_nf4(
    weight: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    memory: NF4Memory | None = None,
) -> NF4Weight:
    """``weight`` (fp32, bf16 or fp16) in NF4 on its own device, in ``memory`` if it is given."""
    n = weight.numel()
    codes = absmax = None
    if memory is not None:
        codes, absmax = memory.take(code_count(n), block_count(n, block_size))
    codes, scales = quantize_blocks(weight, block_size, codes)
    nested = offset = None
    if double_quant:
        scales, nested, offset = quantize_scales(scales)
    absmax = scales if absmax is None else absmax.copy_(scales)
    return NF4Weight(codes, absmax, tuple(weight.shape), block_size, nested, offset)
