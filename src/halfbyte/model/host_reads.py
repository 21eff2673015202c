"""Operations that make the host wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostReads(TorchDispatchMode):
    """Notes, while it lasts, the operations that bring values to the host or take them from there.

    Those are what a CUDA graph cannot record: ``.item()`` and what asks for it, shapes that follow
    from values, and copies between devices. ``found`` has their names.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
        # A number that came as a tensor may lie on the CPU: it is given to the kernel by value.
        devices = {t.device.type for t in tensors if t.dim() or t.device.type != "cpu"}
        if _READING & set(func.tags) or len(devices) > 1:
            self.found.append(str(func))
        return out
