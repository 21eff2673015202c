"""Of each row how well a model predicts it: losses, and tokens that are the likeliest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from halfbyte.data.batch import Batch, TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.evaluate.held_out import TOKENS_AT_ONCE, groups_of
from halfbyte.model.causal import QLoRAModel

# Logits in memory at a time: 64 MB in fp32, 128 positions of a vocabulary of 131,072.
LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class RowLosses:
    """Sums over the tokens of each row, arrays [rows].

    ``loss`` float64 is the sum of the cross-entropies in nats over all of a row's ``tokens`` that
    are predicted, which are all but the first; ``label_loss`` that over its ``labels``, which are
    the tokens that carry loss in training. ``right`` and ``label_right`` count those of them that
    are the model's likeliest token. All but the losses are int64.
    """

    loss: np.ndarray
    tokens: np.ndarray
    right: np.ndarray
    label_loss: np.ndarray
    labels: np.ndarray
    label_right: np.ndarray

    def summed(self, owner: np.ndarray, rows: int) -> RowLosses:
        """The same for ``rows`` rows, of which ``owner`` int64 says whose part each one here is."""

        def total(values: np.ndarray) -> np.ndarray:
            found = np.zeros(rows, dtype=values.dtype)
            np.add.at(found, owner, values)
            return found

        return RowLosses(**{f.name: total(getattr(self, f.name)) for f in fields(self)})


@torch.no_grad()
def row_losses(
    model: QLoRAModel,
    rows: Sequence[TokenizedRow],
    *,
    tokens_at_once: int = TOKENS_AT_ONCE,
    labels_only: bool = False,
    after_batch: Callable[[int], None] = lambda rows: None,
) -> RowLosses:
    """What ``model`` makes of each of ``rows``; dropout off, weights untouched.

    Logits are made in fp32 for a few positions at a time and never kept. With ``labels_only`` they
    are made at the labels alone, and ``loss``, ``tokens`` and ``right`` are those of the labels.
    ``after_batch`` hears how many rows are done.
    """
    training = model.network.training
    model.network.eval()
    found: list[dict[str, np.ndarray]] = []
    done = 0
    try:
        for group in groups_of(rows, tokens_at_once):
            found.append(_of_batch(model, make_batch(group), len(group), labels_only))
            done += len(group)
            after_batch(done)
    finally:
        model.network.train(training)
    names = [field.name for field in fields(RowLosses)]
    if not found:
        empty = {name: np.zeros(0, np.float64 if "loss" in name else np.int64) for name in names}
        return RowLosses(**empty)
    return RowLosses(**{name: np.concatenate([part[name] for part in found]) for name in names})


def _of_batch(
    model: QLoRAModel, batch: Batch, rows: int, labels_only: bool
) -> dict[str, np.ndarray]:
    hidden = model.hidden(batch)
    count = batch.num_tokens
    borders = batch.cu_seqlens[: rows + 1].long()
    owner = torch.repeat_interleave(torch.arange(rows), borders.diff())
    # Position t predicts token t + 1, unless that begins the next row.
    at = torch.arange(count)
    ends = torch.zeros(count, dtype=torch.bool)
    ends[borders[1:] - 1] = True
    at = at[~ends & (batch.labels != -100)] if labels_only else at[~ends]
    losses, right = _at(model, hidden, at, batch.input_ids[at + 1])
    owner = owner[at]
    label = batch.labels[at] != -100

    def total(values: Tensor, where: Tensor) -> np.ndarray:
        found = torch.zeros(rows, dtype=values.dtype)
        return found.index_add_(0, owner[where], values[where]).numpy()

    every, one = torch.ones_like(label), torch.ones(len(at), dtype=torch.int64)
    return {
        "loss": total(losses, every),
        "tokens": total(one, every),
        "right": total(right, every),
        "label_loss": total(losses, label),
        "labels": total(one, label),
        "label_right": total(right, label),
    }


def _at(model: QLoRAModel, hidden: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies float64 and whether the target is the likeliest int64, on the CPU."""
    head = model.head
    weight = head.weight.to(model.compute_dtype)
    losses, right = [], []
    for some in torch.arange(len(at)).split(max(1, LOGITS_AT_ONCE // weight.shape[0])):
        states = hidden[at[some].to(hidden.device)].to(model.compute_dtype)
        z = (states @ weight.t()).float() * head.scale
        if head.softcap is not None:
            z = head.softcap * torch.tanh(z / head.softcap)
        target = targets[some].to(z.device)
        picked = z.gather(1, target[:, None])[:, 0]
        losses.append((z.logsumexp(dim=1).double() - picked.double()).cpu())
        right.append((z.argmax(dim=1) == target).long().cpu())
    if not losses:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    return torch.cat(losses), torch.cat(right)
