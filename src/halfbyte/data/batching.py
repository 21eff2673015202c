"""Batches of rows, each a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from halfbyte.data.batch import Batch, Bucket, TokenizedRow
from halfbyte.data.packing import Packs

IGNORED = -100  # the label of a position that learns nothing, as in torch's cross-entropy


def make_batch(
    rows: Sequence[TokenizedRow],
    capacity: int | None = None,
    tokens: int | None = None,
    labels: int | None = None,
    max_seqlen: int | None = None,
) -> Batch:
    """Put ``rows`` end to end.

    ``cu_seqlens`` has ``capacity + 1`` borders (by default one more than there are rows); missing
    rows repeat the last border. A label never crosses a border: the last position of a row would
    predict the first token of the next, and the first token of a row is never learned.

    With ``tokens`` the batch is padded at its end to so many positions, and with ``labels`` its
    label index to so many entries. The padding is cut into rows of at most ``max_seqlen``, behind
    ``ceil(tokens / max_seqlen)`` further borders (those not needed repeat ``tokens``), so that
    the length of ``cu_seqlens`` follows from the capacity and the bucket alone. Without
    ``max_seqlen`` it is one row, behind one further border.

    Raises ValueError where the rows do not fit.
    """
    capacity = len(rows) if capacity is None else capacity
    if not 1 <= len(rows) <= capacity:
        raise ValueError(f"{len(rows)} rows do not fit a batch of 1 to {capacity}")
    lengths = np.array([len(row) for row in rows])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    used = int(ends[-1])
    total = used if tokens is None else tokens
    longest = int(lengths.max())
    if used > total or longest > (longest if max_seqlen is None else max_seqlen):
        raise ValueError(
            f"{used} tokens in rows of up to {longest} do not fit a batch of {total} in rows of "
            f"up to {max_seqlen}"
        )
    learned = np.concatenate([row.loss_mask for row in rows])
    learned[starts] = False
    ids = np.zeros(total, dtype=np.int64)
    np.concatenate([row.input_ids for row in rows], out=ids[:used])
    shifted = np.full(total, IGNORED, dtype=np.int64)
    shifted[: used - 1][learned[1:]] = ids[1:used][learned[1:]]
    borders = _borders(ends, capacity, tokens, max_seqlen)
    num_labels = int(learned.sum())
    index = _label_index(learned, total, num_labels if labels is None else labels)
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(
            np.arange(total) - np.repeat(borders[:-1].astype(np.int64), np.diff(borders))
        ),
        cu_seqlens=torch.from_numpy(borders),
        labels=torch.from_numpy(shifted),
        label_index=torch.from_numpy(index),
        label_ids=torch.from_numpy(shifted[index]),
        max_seqlen=int(np.diff(borders).max()) if max_seqlen is None else max_seqlen,
        num_tokens=used,
        num_labels=num_labels,
        rows=tuple(row.row for row in rows),
    )


def _borders(
    ends: np.ndarray, capacity: int, tokens: int | None, max_seqlen: int | None
) -> np.ndarray:
    """``cu_seqlens`` of rows that end at ``ends``, and of the padding up to ``tokens``."""
    used = int(ends[-1])
    borders = np.full(capacity + 1, used, dtype=np.int32)
    borders[0] = 0
    borders[1 : len(ends) + 1] = ends
    if tokens is None:
        return borders
    piece = tokens if max_seqlen is None else max_seqlen
    padding = used + piece * np.arange(1, -(-tokens // piece) + 1)
    return np.concatenate([borders, np.minimum(padding, tokens).astype(np.int32)])


def _label_index(learned: np.ndarray, total: int, count: int) -> np.ndarray:
    """Positions before the tokens that are ``learned``, and the last position up to ``count``."""
    at = np.flatnonzero(learned) - 1
    if len(at) > count:
        raise ValueError(f"{len(at)} labels do not fit a batch of {count}")
    return np.concatenate([at, np.full(count - len(at), total - 1)])


class Batches:
    """The training rows by optimizer step.

    An epoch is a permutation of the rows that follows from the seed and the epoch's number, cut
    into steps of ``batch_size`` × ``gradient_accumulation`` rows; its last step and last
    micro-batch may be smaller, and nothing crosses into the next epoch. With ``packs``, made of
    these rows, it is packs that are permuted and counted, and a micro-batch has the rows of
    ``batch_size`` packs, still end to end, each a row of its own. A step depends on nothing but
    the seed and its number, so the position to go on from is that number.

    With ``buckets`` each micro-batch is padded to the first of them, in their order, that holds
    it; ValueError where none does.
    """

    def __init__(
        self,
        rows: Sequence[TokenizedRow],
        batch_size: int,
        gradient_accumulation: int,
        seed: int,
        buckets: Sequence[Bucket] | None = None,
        packs: Packs | None = None,
    ) -> None:
        if not rows:
            raise ValueError("there are no rows to make batches of")
        if packs is not None and packs.rows != len(rows):
            raise ValueError(f"{packs.rows} rows were packed, and there are {len(rows)}")
        self.rows = rows
        self.batch_size = batch_size
        self.gradient_accumulation = gradient_accumulation
        self.seed = seed
        self.buckets = None if buckets is None else sorted(buckets)
        self.packs = packs
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None  # the one used last

    @property
    def capacity(self) -> int:
        """No micro-batch has more rows, and ``cu_seqlens`` of each has places for so many."""
        return self.batch_size if self.packs is None else self.packs.most_rows(self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        counted = len(self.rows if self.packs is None else self.packs)
        return -(-counted // (self.batch_size * self.gradient_accumulation))

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of optimizer step ``number``, from 1."""
        return [self._batch([self.rows[i] for i in chosen]) for chosen in self.positions(number)]

    def positions(self, number: int) -> list[np.ndarray]:
        """Positions in ``rows`` of each micro-batch of step ``number``, from 1."""
        if number < 1:
            raise ValueError(f"steps are counted from 1, not {number}")
        epoch, at = divmod(number - 1, self.steps_per_epoch)
        order, borders = self.epoch(epoch)
        first = at * self.gradient_accumulation
        borders = borders[first : first + self.gradient_accumulation + 1]
        return [order[a:b] for a, b in pairwise(borders.tolist())]

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in ``rows`` in the order of epoch ``number``, from 0, int64 [rows]; and where
        in that its micro-batches begin, then its end, int64 [micro-batches + 1]."""
        if self._epoch is None or self._epoch[0] != number:
            self._epoch = (number, *self._made(number))
        return self._epoch[1:]

    def _made(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if self.packs is None:
            generator = np.random.default_rng([self.seed, number])
            order = generator.permutation(len(self.rows))
            starts = np.arange(len(self.rows) + 1)
        else:
            packed = self.packs.epoch(number)
            order, starts = packed.order, packed.starts
        return order, np.append(starts[: -1 : self.batch_size], len(order))

    def _batch(self, rows: list[TokenizedRow]) -> Batch:
        if self.buckets is None:
            return make_batch(rows, self.capacity)
        size = (sum(map(len, rows)), sum(row.num_labels for row in rows), max(map(len, rows)))
        bucket = next((b for b in self.buckets if b.holds(*size)), None)
        if bucket is None:
            raise ValueError(f"no bucket holds {size[0]} tokens with {size[1]} labels")
        return make_batch(rows, self.capacity, bucket.tokens, bucket.labels, bucket.max_seqlen)
