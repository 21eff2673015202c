"""The training step: its mean, its gradients, what a bad gradient does, and that it repeats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")

from halfbyte.data.batch import TokenizedRow
from halfbyte.engine.scaler import GROWTH_STEPS, LossScaler
from halfbyte.engine.step import TrainStep
from oracle.case import Case, Family, adapter_parameters, save_model
from oracle.double import double_model, mean_loss
from oracle.ours import tokenized
from oracle.workshop import micro_batches, model_of, step_of

FAMILIES: list[Family] = ["llama", "qwen3", "gemma3"]
CASE = Case(loss_on="answer", r=64)  # every matrix large enough for 8-bit state


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in found.items():
        save_model(folder, family)
    yield found
    torch.set_num_threads(threads)


@pytest.fixture
def rows(folders: dict[str, Path]) -> list[TokenizedRow]:
    """Eight rows of 41 to 87 tokens with 7 to 33 labels."""
    found = tokenized(folders["llama"], "answer")[:8]
    assert len({row.num_labels for row in found}) > 4
    return found


def gradients(step: TrainStep) -> dict[str, Tensor]:
    return {n: g.clone() for n, g in step.parameters.views(step.parameters.grad).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_gradients_are_those_of_the_mean_over_all_labels(
    family: Family, folders: dict[str, Path], rows: list[TokenizedRow]
) -> None:
    reference_of = model_of(folders[family], CASE)
    reference = double_model(folders[family], CASE, reference_of)
    expected = mean_loss(reference, rows)
    expected.backward()
    for size in (8, 4, 3, 1):
        step = step_of(model_of(folders[family], CASE))
        result = step(1, micro_batches(rows, size))
        torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=2e-6, atol=0)
        for name, parameter in adapter_parameters(reference).items():
            g, want = gradients(step)[name].double(), parameter.grad
            # A norm-wise bound: fp32 rounding of the largest terms reaches the small elements.
            assert (g - want).norm() <= 5e-6 * want.norm(), f"{name}, {size} rows at once"
        norm = torch.stack([p.grad.norm() for p in adapter_parameters(reference).values()]).norm()
        torch.testing.assert_close(result.grad_norm.double(), norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_changes_no_bit(
    family: Family, folders: dict[str, Path], rows: list[TokenizedRow]
) -> None:
    found = []
    for recompute in (False, True):
        model = model_of(folders[family], CASE, dropout=0.1)
        model.use_gradient_checkpointing(recompute)
        step = step_of(model)
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        model.network.get_submodule("model.layers.0.self_attn.q_proj").register_forward_pre_hook(
            count
        )
        loss = step(3, micro_batches(rows, 4)).loss
        assert calls == (4 if recompute else 2)
        found.append((loss, gradients(step), step.parameters.data.clone()))
    (loss, kept, weights), (loss2, recomputed, weights2) = found
    assert torch.equal(loss, loss2)
    assert all(torch.equal(g, recomputed[name]) for name, g in kept.items())
    assert torch.equal(weights, weights2)


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_scale(
    folders: dict[str, Path], rows: list[TokenizedRow]
) -> None:
    step = step_of(model_of(folders["llama"], CASE), fp16=True)
    step(1, micro_batches(rows, 4))
    step.scaler.scale.fill_(3e38)  # times a loss over 1 is more than fp32 holds
    weights = step.parameters.data.clone()
    state = {n: t.clone() for n, t in step.optimizer.state_tensors().items()}
    result = step(2, micro_batches(rows, 4))
    assert not result.updated
    assert not torch.isfinite(result.grad_norm)
    assert torch.isfinite(result.loss)
    assert torch.equal(step.parameters.data, weights)
    assert all(torch.equal(t, state[n]) for n, t in step.optimizer.state_tensors().items())
    assert step.scaler.scale == 1.5e38
    assert step.scaler.good_steps == 0
    # The step after it is a good one again.
    step.scaler.scale.fill_(1024.0)
    assert step(3, micro_batches(rows, 4)).updated
    assert not torch.equal(step.parameters.data, weights)
    assert step.optimizer.count == 2


def test_a_scaled_loss_gives_the_same_step(
    folders: dict[str, Path], rows: list[TokenizedRow]
) -> None:
    found = []
    for fp16 in (False, True):
        step = step_of(model_of(folders["llama"], CASE), "adamw", fp16=fp16)
        results = [step(n, micro_batches(rows, 4)) for n in (1, 2, 3)]
        found.append((results, step.parameters.data))
    for plain, scaled in zip(found[0][0], found[1][0], strict=True):
        # A power of two scales without rounding.
        assert torch.equal(plain.loss, scaled.loss)
        assert torch.equal(plain.grad_norm, scaled.grad_norm)
    assert torch.equal(found[0][1], found[1][1])


def test_the_scale_moves_as_torchs() -> None:
    scaler = LossScaler(True, torch.device("cpu"))
    scale, tracker = scaler.scale.clone(), torch.zeros((), dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    for step in range(3 * GROWTH_STEPS):
        finite = torch.tensor(step > 900 or torch.rand((), generator=generator).item() > 0.01)
        torch._amp_update_scale_(scale, tracker, (~finite).float(), 2.0, 0.5, GROWTH_STEPS)
        scaler.update(finite)
        assert torch.equal(scaler.scale, scale)
        assert scaler.good_steps == tracker
    assert scale != 65536.0


def train(step: TrainStep, rows: list[TokenizedRow], numbers: range) -> Tensor:
    for number in numbers:
        step(number, micro_batches(rows[number:] + rows[:number], 4))
    return step.parameters.data.clone()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_same_seed_gives_the_same_adapter_bit_for_bit(
    optimizer: str, folders: dict[str, Path], rows: list[TokenizedRow]
) -> None:
    def run(seed: int) -> Tensor:
        model = model_of(folders["llama"], CASE, dropout=0.1, seed=seed)
        return train(step_of(model, optimizer), rows, range(1, 6))

    first = run(42)
    assert torch.equal(first, run(42))
    assert not torch.equal(first, run(43))  # other masks


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_resumed_run_is_the_run_that_never_stopped(
    optimizer: str, folders: dict[str, Path], rows: list[TokenizedRow]
) -> None:
    def fresh() -> TrainStep:
        return step_of(model_of(folders["llama"], CASE, dropout=0.1), optimizer, fp16=True)

    whole = train(fresh(), rows, range(1, 6))
    stopped = fresh()
    train(stopped, rows, range(1, 4))
    adapter = {n: p.detach().clone() for n, p in stopped.model.lora_parameters().items()}
    state = {
        name: tensor.clone()
        for part in (stopped.optimizer, stopped.scaler)
        for name, tensor in part.state_tensors().items()
    }
    resumed = fresh()
    with torch.no_grad():
        for name, parameter in resumed.model.lora_parameters().items():
            parameter.copy_(adapter[name])
    resumed.optimizer.load_state_tensors(state)
    resumed.scaler.load_state_tensors(state)
    assert torch.equal(train(resumed, rows, range(4, 6)), whole)
