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

    ``tensors`` is everything that the next step depends on, in main memory of its own; ``best``
    the adapter of the lowest held-out loss, where that is of another step. Beside them go the
    ``files`` of the run folder by their names there, and the first ``events_bytes`` of the record.
    """

    state: CheckpointState
    tensors: dict[str, Tensor]
    best: dict[str, Tensor] | None
    weights: Callable[[], dict[str, str]]  # hashes of the base model's files, once there
    folder: Path  # of the run
    files: tuple[str, ...]
    events_bytes: int


def copy_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of ``tensors`` in main memory, of the same shapes and types.

    Most of them are views of a few large tensors, and each of these is copied once: for TinyLlama
    that is one copy from the GPU in place of 176.
    """
    seen: dict[int, int] = defaultdict(int)  # bytes that are asked for of a piece of memory
    for tensor in tensors.values():
        seen[tensor.untyped_storage().data_ptr()] += tensor.nbytes
    whole: dict[int, Tensor] = {}
    copies = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        at = storage.data_ptr()
        if storage.nbytes() > 2 * seen[at]:  # a small part of something that is no state
            copies[name] = tensor.detach().to("cpu", copy=True)
            continue
        if at not in whole:
            everything = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            everything.set_(storage)
            whole[at] = everything.to("cpu", copy=True)
        copy = torch.empty(0, dtype=tensor.dtype)
        copy.set_(
            whole[at].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        copies[name] = copy
    return copies
