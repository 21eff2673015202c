"""Rows in one batch do not see each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from halfbyte.data.batch import Batch
from halfbyte.data.batching import make_batch
from halfbyte.model.causal import QLoRAModel
from oracle.case import Case, Family, save_model
from oracle.ours import tokenized
from oracle.workshop import model_of

FAMILIES: list[Family] = ["llama", "qwen3", "gemma3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in found.items():
        save_model(folder, family)
    yield found
    torch.set_num_threads(threads)


def logits_and_gradient(model: QLoRAModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [T, vocab], and the loss's gradient [T, hidden] by each token's embedding."""
    embedded: list[Tensor] = []

    def keep(module: object, args: object, out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[-1]

    handle = model.network.get_input_embeddings().register_forward_hook(keep)
    loss = model.loss_sum(batch)
    (gradient,) = torch.autograd.grad(loss, embedded[-1:])
    with torch.no_grad():
        logits = model.logits(batch)
    handle.remove()
    return logits, gradient[0]


@pytest.mark.parametrize("changed", [0, 1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_changing_a_row_changes_no_bit_of_another(
    family: Family, changed: int, folders: dict[str, Path]
) -> None:
    model = model_of(folders[family], Case(family), dropout=0.1)
    model.network.train()
    rows = tokenized(folders[family], "all")[:4]
    other = replace(rows[changed], input_ids=(rows[changed].input_ids * 7 + 5) % 300, row=len(rows))
    batch = make_batch(rows)
    batch2 = make_batch([other if i == changed else row for i, row in enumerate(rows)])
    logits, gradient = logits_and_gradient(model, batch)
    logits2, gradient2 = logits_and_gradient(model, batch2)
    borders = batch.cu_seqlens.tolist()
    for row in range(4):
        at = slice(borders[row], borders[row + 1])
        assert torch.equal(logits[at], logits2[at]) == (row != changed)
        assert torch.equal(gradient[at], gradient2[at]) == (row != changed)
        assert gradient[at].abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_batch_is_the_row_alone(family: Family, folders: dict[str, Path]) -> None:
    """Also with room for rows that are not there, which repeat the last border."""
    model = model_of(folders[family], Case(family))
    rows = tokenized(folders[family], "answer")[:3]
    batch = make_batch(rows, capacity=6)
    logits, gradient = logits_and_gradient(model, batch)
    borders = batch.cu_seqlens.tolist()
    for number, row in enumerate(rows):
        at = slice(borders[number], borders[number + 1])
        alone, gradient_alone = logits_and_gradient(model, make_batch([row]))
        torch.testing.assert_close(logits[at], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient[at], gradient_alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_row_and_learns_nothing(
    family: Family, folders: dict[str, Path]
) -> None:
    """Dropout masks included: a token of a padded batch has the mask that it has without."""
    model = model_of(folders[family], Case(family), dropout=0.1)
    model.network.train()
    rows = tokenized(folders[family], "answer")[:3]
    plain = make_batch(rows, capacity=4)
    used, longest = plain.num_tokens, plain.max_seqlen
    padded = make_batch(rows, 4, used + longest + 20, plain.num_labels + 9, longest)
    logits, gradient = logits_and_gradient(model, plain)
    logits2, gradient2 = logits_and_gradient(model, padded)
    torch.testing.assert_close(logits2[:used], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient2[:used], gradient, rtol=1e-4, atol=1e-4)
    assert logits2.isfinite().all()
    assert not gradient2[used:].any()
    weights = list(model.lora_parameters().values())
    gradients = [torch.autograd.grad(model.loss_sum(batch), weights) for batch in (plain, padded)]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()
