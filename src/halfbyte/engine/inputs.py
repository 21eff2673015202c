"""Memory on the device that a captured pass reads its batch from."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.data.batch import Batch, Bucket
from halfbyte.engine.step import MicroBatch


class StaticInputs:
    """The tensors of a micro-batch of one bucket at fixed addresses, filled by one copy."""

    def __init__(self, bucket: Bucket, borders: int, device: torch.device) -> None:
        """``borders`` is the length of ``cu_seqlens``, which the batches of a bucket share."""
        self.bucket = bucket
        t, n = bucket.tokens, bucket.labels
        self.sizes = (t, t, borders, t, n, n, 2, 1)
        self.flat = torch.zeros(sum(self.sizes), dtype=torch.int64, device=device)
        self.borders = torch.zeros(borders, dtype=torch.int32, device=device)
        ids, positions, self._borders64, labels, index, label_ids, position, count = (
            self.flat.split(self.sizes)
        )
        self.micro = MicroBatch(
            batch=Batch(
                input_ids=ids,
                position_ids=positions,
                cu_seqlens=self.borders,
                labels=labels,
                label_index=index,
                label_ids=label_ids,
                max_seqlen=bucket.max_seqlen,
                num_tokens=t,
                num_labels=n,
            ),
            position=position,
            num_labels=count.view(()),
        )

    def fill(self, batch: Batch, number: int, index: int, num_labels: int) -> None:
        """Put ``batch`` (on the host, in this bucket) there, after what is enqueued already."""
        # Pinned memory, so that the host need not wait; the allocator does not give it to
        # anybody else before the copy is done.
        host = torch.empty(len(self.flat), dtype=torch.int64, pin_memory=True)
        parts: list[Tensor] = [
            batch.input_ids,
            batch.position_ids,
            batch.cu_seqlens,
            batch.labels,
            batch.label_index,
            batch.label_ids,
            torch.tensor([number, index]),
            torch.tensor([num_labels]),
        ]
        for to, part in zip(host.split(self.sizes), parts, strict=True):
            to.copy_(part)
        self.flat.copy_(host, non_blocking=True)

    def unpack(self) -> None:
        """Bring the borders to the type that kernels read; part of the captured pass."""
        self.borders.copy_(self._borders64)
