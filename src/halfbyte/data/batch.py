"""The types that flow from the data to the training step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered row and whether the loss is taken on it."""

    text: str
    learn: bool


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One row as the model sees it.

    ``input_ids`` int32 [n]; ``loss_mask`` bool [n], true where the token itself is to be learned
    (the first token never can be: nothing predicts it); ``row`` is its number in the source, from
    0. ``cut`` counts its tokens that were taken off, and ``start`` those that lie before the
    first one here, the leading ones not counted: they were taken off too, or are in other rows of
    the same number.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    row: int
    cut: int = 0
    start: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        """Tokens that carry loss once labels are shifted: the first has no predecessor."""
        return int(self.loss_mask[1:].sum())


@dataclass(frozen=True, order=True)
class Bucket:
    """A shape that batches are padded to, so that few shapes repeat."""

    tokens: int  # positions of the padded batch
    labels: int  # entries of its label index
    max_seqlen: int  # no row of it is longer, the rows of padding included

    def holds(self, tokens: int, labels: int, longest: int) -> bool:
        """Whether rows of so many tokens and labels in all, the longest of ``longest``, fit."""
        return tokens <= self.tokens and labels <= self.labels and longest <= self.max_seqlen


@dataclass(frozen=True)
class Batch:
    """Rows end to end; the one batch type of CPU and GPU.

    ``input_ids`` and ``position_ids`` int64 [T], positions from 0 in each row; ``cu_seqlens``
    int32 [rows + 1], of fixed length: a batch with fewer rows repeats its last border (rows of
    length 0); ``labels`` int64 [T], already shifted: ``labels[t]`` is the token that position t
    learns to predict, -100 where it learns nothing, so never the first token of the next row.

    ``label_index`` int64 [n] are the positions whose label is not -100, ascending, and
    ``label_ids`` int64 [n] their labels. A batch in a bucket has n of the bucket: position T - 1,
    which never has a label, is repeated with the label -100.

    A batch in a bucket also has T of the bucket: behind its rows lies padding (id 0, no label) in
    rows of its own, which no row sees and which sees no row. ``num_tokens`` counts the tokens
    without padding, ``num_labels`` the labels that are not -100. No row is longer than
    ``max_seqlen``, rows of padding included: the longest row's length, or what the bucket states.
    ``rows`` are the numbers of the rows in the source.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    labels: torch.Tensor
    label_index: torch.Tensor
    label_ids: torch.Tensor
    max_seqlen: int
    num_tokens: int
    num_labels: int
    rows: tuple[int, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            label_index=self.label_index.to(device, non_blocking=True),
            label_ids=self.label_ids.to(device, non_blocking=True),
        )
