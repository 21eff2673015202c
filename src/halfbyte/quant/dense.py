"""A weight that is not quantized, in the place of one that is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseWeight:
    """A frozen weight as its checkpoint holds it, for a layer that its maker left out of 4 bits."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``; the tensor itself where it is in it."""
        return self.values.to(dtype)
