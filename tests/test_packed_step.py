"""A step on packs is the step on the same rows without them: the loss, and every gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.batching import Batches, make_batch
from halfbyte.data.packing import Packs
from halfbyte.engine.step import TrainStep
from oracle.case import Case, adapter_parameters, save_model
from oracle.double import double_model, mean_loss
from oracle.ours import tokenized
from oracle.workshop import model_of, step_of

CASE = Case(loss_on="answer")
LENGTH = 220


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder, "llama")
    return folder


def gradients(step: TrainStep) -> dict[str, Tensor]:
    return {n: g.clone() for n, g in step.parameters.views(step.parameters.grad).items()}


def packed(rows: list[TokenizedRow], size: int, accumulation: int) -> Batches:
    packs = Packs(np.array([len(row) for row in rows]), LENGTH, seed=5)
    assert packs.count < len(rows) / 2
    return Batches(rows, size, accumulation, seed=5, packs=packs)


@pytest.mark.parametrize(("size", "accumulation"), [(1, 3), (3, 1), (2, 2)])
def test_packed_equals_unpacked(folder: Path, size: int, accumulation: int) -> None:
    rows = tokenized(folder, "answer")
    batches = packed(rows, size, accumulation)
    reference_of = model_of(folder, CASE)
    reference = double_model(folder, CASE, reference_of)
    generator = np.random.default_rng(size)
    for number in (1, batches.steps_per_epoch, batches.steps_per_epoch + 1):
        micro_batches = batches.step(number)
        chosen = [rows[row] for batch in micro_batches for row in batch.rows]
        assert len({row.num_labels for row in chosen}) > 2
        # Each row in a pass of its own, in fp64, by transformers and PEFT.
        reference.zero_grad()
        expected = mean_loss(reference, chosen)
        expected.backward()
        # And the same rows in passes of any number of them, in any order.
        order = generator.permutation(len(chosen))
        cuts = np.sort(generator.choice(np.arange(1, len(chosen)), 3, replace=False))
        anyhow = [make_batch([chosen[i] for i in part]) for part in np.split(order, cuts)]
        one_by_one = [make_batch([row]) for row in chosen]
        for passes in (micro_batches, anyhow, one_by_one):
            step = step_of(model_of(folder, CASE), steps=100)
            result = step(number, passes)
            torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=2e-6, atol=0)
            found = gradients(step)
            for name, parameter in adapter_parameters(reference).items():
                want = parameter.grad
                assert want.norm() > 0
                assert (found[name].double() - want).norm() <= 5e-6 * want.norm(), name


def test_a_row_of_a_pack_sees_no_other(folder: Path) -> None:
    """Bit for bit: its logits, and what its tokens add to the gradient."""
    rows = tokenized(folder, "all")
    model = model_of(folder, CASE)
    [batch] = packed(rows, 1, 1).step(1)
    changed = batch.rows[1]
    other = [
        TokenizedRow((row.input_ids * 7 + 5) % 300, row.loss_mask, row.row)
        if row.row == changed
        else row
        for row in rows
    ]
    [batch2] = packed(other, 1, 1).step(1)
    assert batch2.rows == batch.rows
    assert not torch.equal(batch.input_ids, batch2.input_ids)
    with torch.no_grad():
        logits, logits2 = model.logits(batch), model.logits(batch2)
    borders = batch.cu_seqlens.tolist()
    for place, row in enumerate(batch.rows):
        at = slice(borders[place], borders[place + 1])
        assert torch.equal(logits[at], logits2[at]) == (row != changed)
