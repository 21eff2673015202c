"""Flat parameters, the norm, clipping and the schedules, against torch and transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import get_scheduler

from halfbyte.optim.clip import clip_scale, global_norm
from halfbyte.optim.flat import BLOCK, MIN_8BIT_SIZE, flatten_parameters
from halfbyte.optim.schedule import schedule_table

SHAPES = {
    "a": (16, 100),  # small
    "b": (16, 300),  # in blocks, its last one not whole
    "c": (1, 4096),  # just large enough for blocks
    "d": (5, 3),
    "e": (70, 64),
}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}


def test_values_and_identity_stay_and_no_block_holds_two_tensors() -> None:
    named = parameters()
    before = {name: p.detach().clone() for name, p in named.items()}
    flat = flatten_parameters(named)
    owners: dict[int, set[str]] = {}
    taken = torch.zeros(flat.data.numel(), dtype=torch.int)
    for name, offset, shape in zip(flat.names, flat.offsets, flat.shapes, strict=True):
        assert torch.equal(named[name], before[name])
        taken[offset : offset + shape.numel()] += 1
        blocked = flat.groups[0].blocked
        assert (shape.numel() >= MIN_8BIT_SIZE) == (offset + shape.numel() <= blocked)
        if shape.numel() >= MIN_8BIT_SIZE:
            for block in range(offset // BLOCK, -(-(offset + shape.numel()) // BLOCK)):
                owners.setdefault(block, set()).add(name)
    assert taken.max() == 1
    assert flat.names == tuple(SHAPES)
    assert all(len(names) == 1 for names in owners.values())
    # The parameters see what is done to the flat tensor, and the other way round.
    flat.data.mul_(2.0)
    assert torch.equal(named["b"], before["b"] * 2)
    with torch.no_grad():
        named["b"].copy_(before["b"])
    assert torch.equal(flat.views(flat.data)["b"], before["b"])


@pytest.mark.parametrize("recompute", [False, True])
def test_autograd_adds_into_the_views(recompute: bool) -> None:
    named = parameters()
    flat = flatten_parameters(named)
    copies = {n: p.detach().clone().requires_grad_() for n, p in named.items()}
    x = torch.randn(7, 300, generator=torch.Generator().manual_seed(1))

    def network(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return (x @ p["b"].t()).tanh() @ p["a"] + p["d"].sum() * p["c"].mean() + p["e"].norm()

    for scale in (1.0, 0.5):  # two micro-batches
        if recompute:
            out = checkpoint(network, named, x * scale, use_reentrant=False)
        else:
            out = network(named, x * scale)
        out.square().mean().backward()
        network(copies, x * scale).square().mean().backward()
    for name, view in flat.views(flat.grad).items():
        assert named[name].grad is not None
        assert named[name].grad.data_ptr() == view.data_ptr()
        assert torch.equal(view, copies[name].grad)
    flat.grad.zero_()
    assert all(not p.grad.any() for p in named.values() if p.grad is not None)


def test_only_fp32_is_taken() -> None:
    with pytest.raises(ValueError, match="w is torch"):
        flatten_parameters({"w": nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))})


@pytest.mark.parametrize("limit", [0.3, 1.0, 1e6])
def test_norm_and_clipping_are_torchs(limit: float) -> None:
    named = parameters()
    flat = flatten_parameters(named)
    flat.grad.normal_(generator=torch.Generator().manual_seed(2))
    flat.views(flat.grad)["b"].mul_(100)
    reference = [nn.Parameter(torch.zeros(s)) for s in flat.shapes]
    for p, g in zip(reference, flat.views(flat.grad).values(), strict=True):
        p.grad = g.clone()
    for gap in set(range(flat.data.numel())) - {
        i
        for offset, shape in zip(flat.offsets, flat.shapes, strict=True)
        for i in range(offset, offset + shape.numel())
    }:
        flat.grad[gap] = 0.0
    norm = global_norm(flat.grad)
    expected = nn.utils.clip_grad_norm_(reference, limit)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    clipped = flat.grad * clip_scale(norm, limit)
    for p, g in zip(reference, flat.views(clipped).values(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=2e-6, atol=0)
    assert clip_scale(norm, 0.0) == 1.0


def test_norm_of_many_small_gradients_is_exact_to_fp32() -> None:
    grad = torch.full((5_000_000,), 1e-5)
    grad[0] = 1.0
    assert abs(global_norm(grad).item() / grad.double().norm().item() - 1) < 1e-5
    grad[7] = float("inf")
    assert not torch.isfinite(global_norm(grad))
    grad[7] = float("nan")
    assert not torch.isfinite(global_norm(grad))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("steps", "warmup"), [(375, 0), (100, 7), (1, 0), (1, 1), (10, 9), (10, 10), (10, 25)]
)
def test_schedules_are_those_of_transformers(name: str, steps: int, warmup: int) -> None:
    peak = 2e-4
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = {"constant": "constant_with_warmup"}.get(name, name)
    scheduler = get_scheduler(theirs, optimizer, warmup, steps)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    table = schedule_table(steps, warmup, peak, name)
    assert table.dtype == torch.float32
    # One rounding to fp32; near the end of a cosine 1 + cos cancels, to 1e-16 of the peak.
    torch.testing.assert_close(
        table.double(), torch.tensor(expected).double(), rtol=1.2e-7, atol=1e-19
    )
