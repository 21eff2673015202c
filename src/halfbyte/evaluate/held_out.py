"""Loss on rows that do not train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.data.batch import Batch, TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.evaluate.original_weights import original_weights
from halfbyte.model.causal import QLoRAModel

# Tokens in one forward pass: enough that a weight is dequantized seldom, few enough that the
# widest activation (an MLP of 14,336 in bf16) stays near 60 MB.
TOKENS_AT_ONCE = 2048
# The same where memory allows a copy of all weights, of which this is a small part: a GPU's
# passes cost their launches, and the original weights are read from the disk once a pass.
TOKENS_AT_ONCE_ROOMY = 8192


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross-entropy over ``labels`` labelled tokens of ``rows`` rows, in nats."""

    loss: float
    labels: int
    rows: int


@torch.no_grad()
def held_out_loss(
    model: QLoRAModel,
    rows: Sequence[TokenizedRow],
    *,
    tokens_at_once: int | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> HeldOutLoss:
    """The mean over all labelled tokens of ``rows``; dropout off, weights untouched.

    ``tokens_at_once`` is by default what the model's memory allows, by how its weights are kept.
    ``after_batch`` is called when each batch is done.
    """
    tokens_at_once = tokens_at_once or _tokens_at_once(model)
    training = model.network.training
    model.network.eval()
    total = torch.zeros((), dtype=torch.float64)
    labels = 0
    for batch in batches_of(rows, tokens_at_once):
        total += model.loss_sum(batch).double().cpu()
        labels += batch.num_labels
        after_batch()
    model.network.train(training)
    return HeldOutLoss(total.item() / max(1, labels), labels, len(rows))


def _tokens_at_once(model: QLoRAModel) -> int:
    roomy = model.device.type == "cuda" and all(
        layer.dense is not None for layer in model.linears.values()
    )
    return TOKENS_AT_ONCE_ROOMY if roomy else TOKENS_AT_ONCE


def batches_of(rows: Sequence[TokenizedRow], tokens_at_once: int) -> Iterator[Batch]:
    """Rows in order, as many together as fit (at least one)."""
    return map(make_batch, groups_of(rows, tokens_at_once))


def groups_of(rows: Sequence[TokenizedRow], tokens_at_once: int) -> Iterator[list[TokenizedRow]]:
    """The rows of each of :func:`batches_of`."""
    group: list[TokenizedRow] = []
    size = 0
    for row in rows:
        if group and size + len(row) > tokens_at_once:
            yield group
            group, size = [], 0
        group.append(row)
        size += len(row)
    if group:
        yield group


def unquantized_loss(
    model: QLoRAModel,
    rows: Sequence[TokenizedRow],
    read: Callable[[str], Tensor],
    *,
    after_batch: Callable[[], None] = lambda: None,
) -> HeldOutLoss:
    """Held-out loss of the base model as it was before quantization, no adapter.

    ``read(name)`` gives an original tensor, see :func:`original_weights`; passes are long, since
    each of them reads the whole model.
    """
    tokens_at_once = 4 * _tokens_at_once(model)
    with model.adapter_on(False), original_weights(model, read):
        return held_out_loss(model, rows, tokens_at_once=tokens_at_once, after_batch=after_batch)
