"""LoRA+ against PEFT's optimizer of it, torch's AdamW with groups, and bitsandbytes'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

import bitsandbytes
from peft.optimizers import create_loraplus_optimizer

from halfbyte.data.batching import make_batch
from halfbyte.engine.scaler import LossScaler
from halfbyte.engine.step import TrainStep
from halfbyte.optim.choose import make_optimizer
from halfbyte.optim.flat import BLOCK, flatten_parameters
from halfbyte.optim.loraplus import rate_factors
from halfbyte.recipe.schema import LoraRecipe, TrainingRecipe
from lora_case import make_rows, our_model, peft_model, peft_parameters, peft_pass, put
from oracle.case import save_model

RATIO, STEPS = 16, 8
SHAPES = {
    "0.lora_A": (16, 300),
    "0.lora_B": (33, 130),
    "1.lora_A": (4, 20),
    "1.lora_B": (16, 256),
    "1.lora_magnitude_vector": (77,),
    "2.lora_B": (5, 7),
}
WAYS = [
    pytest.param("cpu", False, id="cpu"),
    pytest.param("cuda", False, id="cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", True, id="cuda-kernels", marks=pytest.mark.gpu),
]


def is_fast(name: str) -> bool:
    return name.endswith(("lora_B", "vector"))


def drawn(seed: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(device) for n, s in SHAPES.items()}


@pytest.mark.parametrize(("device", "use_kernels"), WAYS)
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_update_is_that_of_groups(
    name: Any, weight_decay: float, device: str, use_kernels: bool
) -> None:
    named = {n: nn.Parameter(t * 0.1) for n, t in drawn(0, device).items()}
    theirs = {n: nn.Parameter(t * 0.1) for n, t in drawn(0, device).items()}
    training = TrainingRecipe(weight_decay=weight_decay, loraplus_lr_ratio=RATIO)
    flat = flatten_parameters(named, rates=rate_factors(named, training))
    assert [group.rate for group in flat.groups] == [1.0, RATIO]
    assert all(group.start % BLOCK == 0 for group in flat.groups)
    optimizer = make_optimizer(name, flat, training, use_kernels=use_kernels)
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in theirs.items() if is_fast(n) == fast], "lr": 0.0}
        for fast in (False, True)
    ]
    if name == "adamw":
        reference: Any = torch.optim.AdamW(groups, weight_decay=weight_decay)
    else:
        reference = bitsandbytes.optim.AdamW8bit(groups, weight_decay=weight_decay)
    lr, one, yes = (torch.tensor(x, device=device) for x in (0.0, 1.0, True))
    for step in range(STEPS):
        rate = 1e-3 * (1 + step) / STEPS
        for fast, group in zip((False, True), reference.param_groups, strict=True):
            group["lr"] = rate * (RATIO if fast else 1)
        for key, g in drawn(50 + step, device).items():
            flat.views(flat.grad)[key].copy_(g)
            theirs[key].grad = g.clone()
        optimizer.step(lr.fill_(rate), one, yes)
        # A step that is not made changes nothing, the count included.
        optimizer.step(lr.fill_(1.0), one, torch.zeros_like(yes))
        reference.step()
    assert optimizer.count.item() == STEPS
    # bitsandbytes' CUDA kernel decays a parameter behind its update: that too, by lr · λ.
    share = 1e-4 if device == "cpu" else 1e-4 + 1e-3 * RATIO * weight_decay
    for key, p in named.items():
        moved = (theirs[key] - drawn(0, device)[key] * 0.1).abs().max()
        off = (p - theirs[key]).abs()
        few = 0.0 if device == "cpu" else 2e-3  # where a code differs on a GPU
        assert (off > share * moved + 1e-7).float().mean() <= few, key
    # What is saved is all that there is: a second optimizer goes on from it.
    state = {n: t.clone() for n, t in optimizer.state_tensors().items()}
    again = make_optimizer(name, flat, training, use_kernels=use_kernels)
    again.load_state_tensors(state)
    assert all(torch.equal(t, state[n]) for n, t in again.state_tensors().items())


def test_without_a_ratio_nothing_is_grouped() -> None:
    named = {n: nn.Parameter(t) for n, t in drawn(0, "cpu").items()}
    assert len(flatten_parameters(named, rates=rate_factors(named, TrainingRecipe())).groups) == 1


def test_training_is_pefts(tmp_path: Path) -> None:
    """Losses of several steps by TrainStep and by PEFT's own optimizer of its own model."""
    save_model(tmp_path, "llama")
    lora, rows = LoraRecipe(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"]), make_rows()
    ours, theirs = our_model(tmp_path, lora), peft_model(tmp_path, lora)
    for parameters in (ours.lora_parameters(), peft_parameters(theirs)):
        put(parameters)
    training = TrainingRecipe(loraplus_lr_ratio=RATIO)
    trained = ours.lora_parameters()
    flat = flatten_parameters(trained, rates=rate_factors(trained, training))
    rate = 3e-4
    step = TrainStep(
        ours,
        flat,
        make_optimizer("adamw", flat, training),
        torch.full((STEPS,), rate),
        max_grad_norm=0.0,
        scaler=LossScaler(False, torch.device("cpu")),
    )
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=RATIO
    )
    batch = make_batch(rows)
    losses, expected = [], []
    for number in range(1, STEPS + 1):
        losses.append(step(number, [batch]).loss.item())
        optimizer.zero_grad()
        found = peft_pass(theirs, rows)
        expected.append(found.loss / batch.num_labels)
        for p in peft_parameters(theirs).values():
            p.grad /= batch.num_labels
        optimizer.step()
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]
    # One rate for all would not have come this far.
    slow = our_model(tmp_path, lora)
    put(slow.lora_parameters())
    flat = flatten_parameters(slow.lora_parameters())
    plain = TrainStep(
        slow,
        flat,
        make_optimizer("adamw", flat, TrainingRecipe()),
        torch.full((STEPS,), rate),
        max_grad_norm=0.0,
        scaler=LossScaler(False, torch.device("cpu")),
    )
    last = [plain(number, [batch]).loss.item() for number in range(1, STEPS + 1)][-1]
    assert last > losses[-1] + 0.1
