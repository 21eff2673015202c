"""The types that flow from the data to the training step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered row and whether the loss is taken on it."""

    text: str
    learn: bool


@dataclass(frozen=True)
class TokenizedRow:
    """One row as the model sees it.

    ``input_ids`` int32 [n]; ``loss_mask`` bool [n], true where the token itself is to be learned
    (the first token never can be: nothing predicts it); ``row`` is its number in the source, from
    0; ``cut`` counts the tokens taken off its right end.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    row: int
    cut: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        """Tokens that carry loss once labels are shifted: the first has no predecessor."""
        return int(self.loss_mask[1:].sum())


@dataclass(frozen=True)
class Batch:
    """Rows end to end without padding; the one batch type of CPU and GPU.

    ``input_ids`` and ``position_ids`` int64 [T], positions from 0 in each row; ``cu_seqlens``
    int32 [rows + 1], of fixed length: a batch with fewer rows repeats its last border (rows of
    length 0); ``labels`` int64 [T], already shifted: ``labels[t]`` is the token that position t
    learns to predict, -100 where it learns nothing, so never the first token of the next row;
    ``max_seqlen`` the longest row; ``num_labels`` the number of labels that are not -100;
    ``rows`` the numbers of the rows in the source.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    labels: torch.Tensor
    max_seqlen: int
    num_labels: int
    rows: tuple[int, ...] = field(default=())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.cu_seqlens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.max_seqlen,
            self.num_labels,
            self.rows,
        )

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.numel())
