"""Each family against PEFT on transformers in fp64, and rows of a batch against each other.

The reference gets the rows as a padded batch with a mask, as the usual stack trains them; here they
lie end to end. Its base weights are those that ours dequantize to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

pytest.importorskip("peft")

from triton_interpreter import DEVICE

# isort: split
import made_up_model
from family_case import FAMILIES, save_family
from halfbyte.data.batch import Batch, TokenizedRow
from halfbyte.data.batching import make_batch
from halfbyte.errors import ModelError
from halfbyte.kernels.choice import ALL, ELEMENTWISE, PLAIN, Kernels
from halfbyte.model import attention
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.fusable import why_not_fused
from halfbyte.model.fused import NotFusedError
from halfbyte.model.rotary import use_row_rotary
from halfbyte.run.determinism import deterministic
from oracle.case import Case, adapter_parameters
from oracle.double import double_model
from oracle.fused import fuse
from oracle.workshop import model_of

CASE = Case(r=4, lora_alpha=8)
LENGTHS = (11, 1, 23, 9)  # of the rows; windows and original lengths lie between them
CHANGED = 2  # the row whose tokens are changed


def rows_of(*, labelled: Callable[[int], bool] = lambda row: True) -> list[TokenizedRow]:
    random = np.random.default_rng(1)
    rows = []
    for number, n in enumerate(LENGTHS):
        ids, mask = random.integers(3, 300, n).astype(np.int32), random.random(n) < 0.7
        rows.append(TokenizedRow(ids, mask & labelled(number), number))
    return rows


def padded(rows: list[TokenizedRow]) -> Batch:
    return make_batch(rows, 5, tokens=64, labels=48, max_seqlen=32)


@pytest.fixture(scope="module")
def folder_of(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def folder(family: str) -> Path:
        return save_family(FAMILIES[family].make, tiny_model, tmp_path_factory.mktemp("family"))

    return folder


def reference(folder: Path, model: QLoRAModel, *, alone: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss sum and gradients of PEFT's model, of one padded batch or of each row ``alone``.

    In fp32: transformers' mask of a row that sees nothing but padding is NaN in fp64.
    """
    # Told all-linear, PEFT adapts a mixture's experts and router too.
    targets = sorted({name.rpartition(".")[2] for name in model.lora})
    peft = double_model(folder, CASE, model, targets).float()
    total = torch.zeros(())
    for rows in [[row] for row in rows_of()] if alone else [rows_of()]:
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for at, row in enumerate(rows):
            n = len(row)
            ids[at, :n], mask[at, :n] = torch.from_numpy(row.input_ids).long(), 1
            labels[at, :n] = ids[at, :n].masked_fill(~torch.from_numpy(row.loss_mask), -100)
        logits = peft(input_ids=ids, attention_mask=mask, use_cache=False).logits
        total = total + torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
    total.backward()
    found = {n: p.grad for n, p in adapter_parameters(peft).items()}
    assert found.keys() == model.lora_parameters().keys()
    return total.detach(), found


def gradients(model: QLoRAModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    parameters = model.lora_parameters()
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad.zero_()
    model.network.train()
    with deterministic(True):
        one = torch.ones((), device=model.device)
        loss = model.loss_and_gradients(batch.to(model.device), one)
    model.network.eval()
    return loss, {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}


def assert_near(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, Any]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=2e-6, atol=0)
    for name, want in wanted[1].items():
        assert want.norm() > 0, name
        apart = ((found[1][name] - want).norm() / want.norm()).item()
        assert apart < 2e-5, f"{name}: {apart:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_as_peft_and_transformers_train_it(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    folder, case = folder_of(family), FAMILIES[family]
    model = model_of(folder, CASE)
    wanted = reference(folder, model, alone=case.by_length)
    batches = make_batch(rows_of()), padded(rows_of())
    for recompute in (False, True):
        model.use_gradient_checkpointing(recompute)
        for batch in batches:
            assert_near(gradients(model, batch), wanted)
    assert (why_not_fused(model.network) is None) == case.fused
    if case.fused:
        for recompute in (0, 2):
            model = model_of(folder, CASE)
            fuse(model, PLAIN, recompute=recompute)
            for batch in batches:
                assert_near(gradients(model, batch), wanted)


def test_an_architecture_that_nobody_listed_trains(tiny_model: Path, tmp_path: Path) -> None:
    made_up_model.register()
    folder = save_family(made_up_model.made_up, tiny_model, tmp_path)
    model = model_of(folder, CASE)
    wanted = reference(folder, model, alone=False)
    assert len(wanted[1]) == 2 * len(model.lora) == 2 * 2 * 3
    for recompute in (False, True):
        model.use_gradient_checkpointing(recompute)
        for batch in (make_batch(rows_of()), padded(rows_of())):
            assert_near(gradients(model, batch), wanted)
    assert_isolated(model)
    with pytest.raises(NotFusedError, match="its layers are MadeUpLayer"):
        fuse(model, PLAIN)


@pytest.mark.parametrize("attends", ["itself", "mask"])
def test_one_that_would_be_trained_wrongly_is_refused(
    attends: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The window is longer than the rows that a model is checked with when it is loaded."""
    made_up_model.register()
    folder = save_family(lambda: made_up_model.made_up(attends, 50), tiny_model, tmp_path)
    with pytest.raises(ModelError, match="MadeUpForCausalLM attends or ends in a way") as error:
        model_of(folder, CASE)
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_each_row_is_turned_by_its_own_length(kind: str) -> None:
    """As transformers' own embedding, made anew for each row, turns it; in any order of rows."""
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, max_position_embeddings=32)
    config.rope_parameters = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0}
    if kind == "longrope":
        config.rope_parameters |= {
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 5.0, 9.0],
            "original_max_position_embeddings": 32,
        }
    holder = nn.Module()
    holder.rotary = LlamaRotaryEmbedding(config)
    use_row_rotary(holder)
    x = torch.zeros(1)
    for lengths in ([5, 60, 32, 33, 40, 1], [60, 5, 40, 20]):
        packed = torch.cat([torch.arange(n) for n in lengths])[None]
        found = holder.rotary(x, packed)
        alone = [LlamaRotaryEmbedding(config)(x, torch.arange(n)[None]) for n in lengths]
        for got, parts in zip(found, zip(*alone, strict=True), strict=True):
            assert torch.equal(got, torch.cat(parts, dim=1))
        together = LlamaRotaryEmbedding(config)(x, packed)
        assert not torch.equal(found[0], together[0])


# What attends and, in fused layers, does all the rest.
BACKENDS: dict[str, Kernels | None] = {
    "row by row": None,
    "by a kernel": ALL,
    "by PyTorch's kernel": ELEMENTWISE,
    "fused": PLAIN,
    "fused, by kernels": ALL,
    "fused, by a T4's kernels": ELEMENTWISE,
}
# Where there is no GPU the kernels' interpreter takes half a minute for a model: one of each kind.
INTERPRETED = [("gemma 3", "by a kernel"), ("mistral", "fused, by kernels")]


def isolation_cases() -> Iterator[Any]:
    for family, case in FAMILIES.items():
        for backend, kernels in BACKENDS.items():
            fused = backend.startswith("fused")
            if (fused and not case.fused) or (kernels and not fused and not case.kernel):
                continue
            anywhere = kernels in (None, PLAIN) or (family, backend) in INTERPRETED
            yield pytest.param(family, backend, marks=[] if anywhere else [pytest.mark.gpu])


@pytest.mark.parametrize(("family", "backend"), isolation_cases())
def test_no_row_sees_another(family: str, backend: str, folder_of: Callable[[str], Path]) -> None:
    """Other tokens in one row change no bit of the others' logits, losses and gradients."""
    model = with_backend(folder_of(family), backend)
    assert_isolated(model, slow=DEVICE == "cpu" and BACKENDS[backend] is ALL)


def with_backend(folder: Path, backend: str) -> QLoRAModel:
    model, kernels = model_of(folder, CASE, device=DEVICE), BACKENDS[backend]
    if backend.startswith("fused"):
        assert kernels is not None
        fuse(model, kernels, recompute=1)
    elif kernels is not None:
        model.use_kernels(kernels)
    return model


def assert_isolated(model: QLoRAModel, *, slow: bool = False) -> None:
    """``slow`` leaves out what each row costs by itself."""
    before, after = rows_of(labelled=others), changed(rows_of(labelled=others))
    found = [gradients(model, padded(rows)) for rows in (before, after)]
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert gradient.norm() > 0
        assert torch.equal(gradient, found[1][1][name]), name
    if model.fused is None:
        with torch.no_grad():
            logits = [model.logits(padded(rows)).split([*LENGTHS, 20]) for rows in (before, after)]
        for number, (one, other) in enumerate(zip(*logits, strict=True)):
            assert torch.equal(one, other) == (number != CHANGED), number
    for number, length in enumerate(LENGTHS):
        if slow or length == 1:
            continue
        rows = rows_of(labelled=lambda row, n=number: row == n)
        with torch.no_grad():
            losses = [model.loss_sum(padded(r)) for r in (rows, changed(rows))]
        assert torch.equal(*losses) == (number != CHANGED), number


def test_the_comparison_sees_a_row_that_sees_another(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_backend(folder_of("llama 2"), "row by row")
    attend = attention._row_attention

    def across(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
        out = attend(q, k, v, *how)
        last.append(v.detach()[:, :, -1:].repeat_interleave(2, dim=1))
        return out + 1e-4 * last[-2] if len(last) > 1 else out

    last: list[Tensor] = []
    monkeypatch.setattr(attention, "_row_attention", across)
    with pytest.raises(AssertionError):
        assert_isolated(model)


def others(row: int) -> bool:
    return row != CHANGED


def changed(rows: list[TokenizedRow]) -> list[TokenizedRow]:
    """The rows with other tokens in one of them, from its first on."""
    row = rows[CHANGED]
    ids = np.random.default_rng(2).integers(3, 300, len(row)).astype(np.int32)
    return [replace(r, input_ids=ids) if r is row else r for r in rows]
