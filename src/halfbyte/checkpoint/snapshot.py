"""A run at the end of a step, copied aside while the next steps change what it was made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.checkpoint.state import CheckpointState


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint will hold.

    ``tensors`` is everything that the next step depends on, in main memory that nothing changes
    until it is written; ``best`` the adapter of the lowest held-out loss, on any device, where that
    is of another step. Beside them go the ``files`` of the run folder by their names there, and the
    first ``events_bytes`` of the record.
    """

    state: CheckpointState
    tensors: dict[str, Tensor]
    best: dict[str, Tensor] | None
    weights: Callable[[], dict[str, str]]  # hashes of the base model's files, once there
    folder: Path  # of the run
    files: tuple[str, ...]
    events_bytes: int


class HostCopies:
    """Main memory that the same tensors are copied into again and again.

    Most of a run's tensors are views of a few large ones, and each of these is copied once: for
    TinyLlama one copy in place of 176. Where they are on a GPU the memory is pinned and taken once:
    27 MB then take 0.6 ms, and into fresh memory 16 (H200).
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[int, int], Tensor] = {}  # by address and bytes of the original

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of ``tensors``, of the same shapes, strides and types, until the next call."""
        seen: dict[int, int] = defaultdict(int)  # bytes that are asked for of a piece of memory
        for tensor in tensors.values():
            seen[tensor.untyped_storage().data_ptr()] += tensor.nbytes
        copied: dict[int, Tensor] = {}
        copies = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            at = storage.data_ptr()
            if storage.nbytes() > 2 * seen[at]:  # a small part of something that is no state
                copies[name] = tensor.detach().to("cpu", copy=True)
                continue
            if at not in copied:
                everything = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                everything.set_(storage)
                copied[at] = self._room(everything).copy_(everything, non_blocking=True)
            copy = torch.empty(0, dtype=tensor.dtype)
            copy.set_(
                copied[at].untyped_storage(),
                tensor.storage_offset(),
                tensor.shape,
                tensor.stride(),
            )
            copies[name] = copy
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return copies

    def _room(self, everything: Tensor) -> Tensor:
        key = (everything.data_ptr(), everything.nbytes)
        if key not in self._memory:
            self._memory[key] = torch.empty(
                everything.nbytes, dtype=torch.uint8, pin_memory=everything.is_cuda
            )
        return self._memory[key]
