"""Batches of rows, each a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from halfbyte.data.batch import Batch, TokenizedRow

IGNORED = -100  # the label of a position that learns nothing, as in torch's cross-entropy


def make_batch(rows: Sequence[TokenizedRow], capacity: int | None = None) -> Batch:
    """Put ``rows`` end to end.

    ``cu_seqlens`` has ``capacity + 1`` borders (by default one more than there are rows); missing
    rows repeat the last border. A label never crosses a border: the last position of a row would
    predict the first token of the next, and the first token of a row is never learned.
    """
    capacity = len(rows) if capacity is None else capacity
    if not 1 <= len(rows) <= capacity:
        raise ValueError(f"{len(rows)} rows do not fit a batch of 1 to {capacity}")
    lengths = np.array([len(row) for row in rows])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    learned = np.concatenate([row.loss_mask for row in rows])
    learned[starts] = False
    labels = np.full_like(ids, IGNORED)
    labels[:-1][learned[1:]] = ids[1:][learned[1:]]
    borders = np.full(capacity + 1, ends[-1], dtype=np.int32)
    borders[0] = 0
    borders[1 : len(rows) + 1] = ends
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(np.arange(len(ids)) - np.repeat(starts, lengths)),
        cu_seqlens=torch.from_numpy(borders),
        labels=torch.from_numpy(labels),
        max_seqlen=int(lengths.max()),
        num_labels=int(learned.sum()),
        rows=tuple(row.row for row in rows),
    )


class Batches:
    """The training rows by optimizer step.

    An epoch is a permutation of the rows that follows from the seed and the epoch's number, cut
    into steps of ``batch_size`` × ``gradient_accumulation`` rows; its last step and last
    micro-batch may be smaller, and nothing crosses into the next epoch. A step depends on nothing
    but the seed and its number, so the position to go on from is that number.
    """

    def __init__(
        self,
        rows: Sequence[TokenizedRow],
        batch_size: int,
        gradient_accumulation: int,
        seed: int,
    ) -> None:
        if not rows:
            raise ValueError("there are no rows to make batches of")
        self.rows = rows
        self.batch_size = batch_size
        self.rows_per_step = batch_size * gradient_accumulation
        self.seed = seed
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch used last

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.rows_per_step)

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of optimizer step ``number``, from 1."""
        if number < 1:
            raise ValueError(f"steps are counted from 1, not {number}")
        epoch, at = divmod(number - 1, self.steps_per_epoch)
        chosen = self.order(epoch)[at * self.rows_per_step : (at + 1) * self.rows_per_step]
        return [
            make_batch([self.rows[i] for i in chosen[k : k + self.batch_size]], self.batch_size)
            for k in range(0, len(chosen), self.batch_size)
        ]

    def order(self, epoch: int) -> np.ndarray:
        """Positions in ``rows`` in the order of ``epoch``, from 0; int64 [rows]."""
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._order = (epoch, generator.permutation(len(self.rows)))
        return self._order[1]
