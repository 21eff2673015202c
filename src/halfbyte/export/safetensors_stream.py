"""safetensors files written a tensor at a time.

Eight bytes, little-endian, say how long the header is. The header is JSON: of each tensor its type,
its shape, and where in what follows it lies. As all of that is known before the first tensor is
made, no more than one has to be in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, planned: Sequence[Planned], make: Callable[[Planned], Tensor]
) -> None:
    """Write ``planned`` into ``path``, each as ``make`` gives it when its turn comes.

    Raises ValueError where that is of another shape or type than was planned.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for one in planned:
        header[one.name] = {
            "dtype": _CODES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [at, at + one.nbytes],
        }
        at += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for one in planned:
            tensor = make(one)
            if tuple(tensor.shape) != one.shape or tensor.dtype != one.dtype:
                raise ValueError(
                    f"{one.name} is {tensor.dtype} {list(tensor.shape)}, where {one.dtype} "
                    f"{list(one.shape)} was planned"
                )
            if one.nbytes:
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
