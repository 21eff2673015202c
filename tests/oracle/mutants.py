"""Eight ways to train something else, each a change of one of halfbyte's own functions.

A mutant is a function that makes the change through ``monkeypatch``; it takes effect for a model
that is loaded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.data import batching
from halfbyte.data.batch import Batch
from halfbyte.model import attention
from halfbyte.model.causal import QLoRAModel
from halfbyte.optim.adamw import AdamW
from halfbyte.quant import linear
from oracle import ours

Mutant = Callable[[pytest.MonkeyPatch], None]


def never_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdamW, "step", lambda *_: None)


def alpha_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    product = linear.lora_linear

    def halved(*args: Any, scale: float, **kwargs: Any) -> Tensor:
        return product(*args, scale=scale / 2, **kwargs)

    monkeypatch.setattr(linear, "lora_linear", halved)


def mean_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row's mean counts the same, however many labels the row has."""

    def loss_sum(self: QLoRAModel, batch: Batch) -> Tensor:
        logits = self.hidden(batch) @ self.head.weight.t()
        each = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        borders = batch.cu_seqlens.tolist()
        rows = pairwise(borders)
        means = [each[a:b].sum() / (batch.labels[a:b] != -100).sum() for a, b in rows]
        return torch.stack(means).mean() * batch.num_labels

    monkeypatch.setattr(QLoRAModel, "loss_sum", loss_sum)


def _change_batches(monkeypatch: pytest.MonkeyPatch, change: Callable[[Batch], Batch]) -> None:
    make_batch = batching.make_batch

    def changed(*args: Any, **kwargs: Any) -> Batch:
        return change(make_batch(*args, **kwargs))

    monkeypatch.setattr(batching, "make_batch", changed)


def _relabelled(batch: Batch, labels: Tensor) -> Batch:
    """``batch`` with other labels, in all the forms in which it has them."""
    index = torch.nonzero(labels != -100).squeeze(1)
    return replace(
        batch,
        labels=labels,
        label_index=index,
        label_ids=labels[index],
        num_labels=len(index),
    )


def labels_shifted_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A position learns the token that stands there, as labels that were never shifted do."""
    _change_batches(monkeypatch, lambda b: _relabelled(b, b.labels.roll(1)))


def end_unlabelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing learns to predict the end-of-sequence token."""

    _change_batches(
        monkeypatch, lambda b: _relabelled(b, b.labels.masked_fill(b.labels == 2, -100))
    )


def attention_across_a_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second row sees the first; the other borders hold."""
    right = attention.varlen_attention

    def across(*args: Any, row_borders: list[int], **kwargs: Any) -> Any:
        # A model checks itself with two rows when it is made, and would be refused there.
        if len(row_borders) > 3:
            row_borders = [row_borders[0], *row_borders[2:]]
        return right(*args, row_borders=row_borders, **kwargs)

    # A model registers the function by this name when it is made.
    monkeypatch.setattr(attention, "varlen_attention", across)


def one_adapter_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of all computes without its adapter."""
    attach_lora = ours.attach_lora

    def attach_but_one(*args: Any, **kwargs: Any) -> dict[str, linear.QLoRALinear]:
        lora = attach_lora(*args, **kwargs)
        lora["model.layers.0.self_attn.o_proj"].adapter_enabled = False
        return lora

    monkeypatch.setattr(ours, "attach_lora", attach_but_one)


def positions_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's positions are 0, 2, 3, 4, …

    Rotary embeddings see only distances, so positions from 1 on, or rows that go on from each
    other, are the same function and no mistake; here all distances to the first token are wrong.
    """
    _change_batches(
        monkeypatch,
        lambda b: replace(b, position_ids=b.position_ids + (b.position_ids > 0).long()),
    )


MUTANTS: dict[str, Mutant] = {
    m.__name__: m
    for m in (
        never_updated,
        alpha_halved,
        mean_per_row,
        labels_shifted_by_one,
        end_unlabelled,
        attention_across_a_border,
        one_adapter_missing,
        positions_off_by_one,
    )
}
