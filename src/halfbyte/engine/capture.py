"""The training step as CUDA graphs, one for each bucket.

Launched from Python, the thousand kernels of a small model's step take longer to launch than to
run. A graph is launched as one. What is captured is :class:`~halfbyte.engine.step.TrainStep`'s own
``accumulate`` and, with the last micro-batch of a step, ``update``: the same kernels on the same
shapes, so that a captured step gives the bits of the eager one. Where a step has one micro-batch,
one graph is the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from halfbyte.data.batch import Batch, Bucket
from halfbyte.engine.inputs import StaticInputs
from halfbyte.engine.result import StepResult
from halfbyte.engine.step import TrainStep

Key = tuple[Bucket, bool]  # whether the update follows


class CapturedStep:
    """``step(number, micro_batches)`` as :class:`TrainStep`, for batches that lie in a bucket."""

    def __init__(
        self, step: TrainStep, buckets: Sequence[Bucket], capacity: int, accumulation: int
    ) -> None:
        """``capacity`` rows at most lie in a micro-batch, ``accumulation`` of those in a step.

        Everything is captured here; the weights, the optimizer and the step stay as they are.
        Raises what CUDA raises where something cannot be captured.
        """
        self.step = step
        device = step.model.device
        self.inputs = {
            bucket: StaticInputs(
                bucket, capacity + 1 + -(-bucket.tokens // bucket.max_seqlen), device
            )
            for bucket in buckets
        }
        self.graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        # Graphs are replayed one after another, so what one has as intermediate memory the next
        # may have as well; the largest is made first.
        self._pool = torch.cuda.graph_pool_handle()
        self._whole = accumulation == 1
        # All buckets are first run eagerly, in memory that is given back before the graphs have
        # theirs: so the two are never there at once.
        for bucket in self.inputs:
            self._warm_up(bucket)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        lasts = (True,) if accumulation == 1 else (False, True)
        for bucket in sorted(buckets, reverse=True):
            for last in lasts:
                self._capture(bucket, last)

    def __call__(self, number: int, micro_batches: Sequence[Batch]) -> StepResult:
        """Step ``number`` (from 1); each of ``micro_batches`` has the shape of a bucket."""
        num_labels = sum(batch.num_labels for batch in micro_batches)
        self.step.model.begin_step(number)
        if not self._whole:
            self.step.begin()
        for index, batch in enumerate(micro_batches):
            bucket = Bucket(len(batch.input_ids), len(batch.label_ids), batch.max_seqlen)
            self.inputs[bucket].fill(batch, number, index, num_labels)
            self.graphs[bucket, index == len(micro_batches) - 1].replay()
        return self.step.result()

    def _warm_up(self, bucket: Bucket) -> None:
        """One step whose update is not made: kernels are compiled, and libraries set up, which no
        capture allows."""
        step, inputs = self.step, self.inputs[bucket]
        inputs.fill(_blank(bucket, len(inputs.borders)), 1, 0, bucket.labels)
        self._begin(inputs)
        # An infinite gradient makes no update, and the scaler is put back.
        kept = {name: t.clone() for name, t in step.scaler.state_tensors().items()}
        step.parameters.grad.fill_(torch.inf)
        step.update()
        step.scaler.load_state_tensors(kept)

    def _capture(self, bucket: Bucket, last: bool) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool)
        try:
            self._begin(self.inputs[bucket])
            if last:
                self.step.update()
        except Exception:
            with suppress(RuntimeError):  # that the capture failed is known
                graph.capture_end()
            raise
        graph.capture_end()
        self.graphs[bucket, last] = graph

    def _begin(self, inputs: StaticInputs) -> None:
        """All of a micro-batch but the update."""
        inputs.unpack()
        if self._whole:
            self.step.begin()
        self.step.accumulate(inputs.micro)


def _blank(bucket: Bucket, borders: int) -> Batch:
    """A batch of nothing but padding in the bucket's shape, with as many labels as it may have."""
    t, n = bucket.tokens, bucket.labels
    at = torch.arange(t)
    labels = torch.where(at < n, 0, -100)
    ends = (torch.arange(borders) * bucket.max_seqlen).clamp(max=t)
    return Batch(
        input_ids=torch.zeros(t, dtype=torch.int64),
        position_ids=at % bucket.max_seqlen,
        cu_seqlens=ends.int(),
        labels=labels,
        label_index=torch.arange(n),
        label_ids=torch.zeros(n, dtype=torch.int64),
        max_seqlen=bucket.max_seqlen,
        num_tokens=t,
        num_labels=n,
    )
